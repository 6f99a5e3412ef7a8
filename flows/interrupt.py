"""Ctrl-C that no library loses. One that catches KeyboardInterrupt, in a callback or while it is imported, goes on; the
next step of a stage then raises it again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def interruptible() -> Iterator[None]:
    """Meanwhile, a Ctrl-C is remembered. In the main thread only.

    What a library raises after it is the Ctrl-C: Prefect answers one that comes before a task's run is made with an
    error about that run (3.8.8).
    """

    def handle(number: int, frame: FrameType | None) -> None:
        _asked.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception:
        raise_if_interrupted()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        _asked.clear()


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt where one has come."""
    if _asked.is_set():
        raise KeyboardInterrupt
