"""What an engine holds beside its weights."""

from __future__ import annotations

from twinloop.serving.engine import Engine


def held_bytes(engine: Engine) -> int:
    """Cache and adapters."""
    adapters = 0 if engine._adapters is None else engine._adapters.nbytes
    return engine._arena.nbytes + adapters
