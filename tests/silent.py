"""Nobody watches the stages of a test."""

from __future__ import annotations


class Silent:
    def started(self, stage: str) -> None: ...

    def stepped(self, stage: str, done: float, total: float, metrics: object) -> None: ...

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None: ...
