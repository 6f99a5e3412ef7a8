"""The adapters of a scheduler's engine while it serves: which ones requests may have, and how many answers use each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from twinloop.models.adapter import Adapter
from twinloop.serving.engine.adapters import LoadedAdapter
from twinloop.serving.engine.engine import Engine


class AdapterDroppedError(Exception):
    """The adapter was dropped before the request for it had its place in the queue."""


class HeldAdapters:
    """Safe for many threads. The engine itself is changed by its own thread alone, between two rounds."""

    def __init__(self, engine: Engine, between_rounds: Callable[[Callable[[], Any]], Future[Any]]):
        """between_rounds: hands work to the engine's thread."""
        self._engine, self._between_rounds = engine, between_rounds
        self._lock = threading.Lock()
        self._answers: dict[LoadedAdapter, int] = {}  # by the last use, the latest last
        self._dropped: dict[LoadedAdapter, int] = {}  # that running answers still use

    @property
    def held(self) -> tuple[LoadedAdapter, ...]:
        """Those that requests may have, the one whose last use is longest ago first."""
        with self._lock:
            return tuple(self._answers)

    def load(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Hold one more; returns when the engine has it. Raises as `Engine.load_adapter`, and SchedulerClosedError."""
        loaded: LoadedAdapter = self._between_rounds(lambda: self._engine.load_adapter(name, adapter)).result()
        with self._lock:
            self._answers[loaded] = 0
        return loaded

    def drop(self, adapter: LoadedAdapter) -> None:
        """Take no more requests for it. Its memory is freed when the last answer that uses it has ended."""
        with self._lock:
            if adapter not in self._answers:
                return
            answers = self._answers.pop(adapter)
            if answers:
                self._dropped[adapter] = answers
        if not answers:
            self._free(adapter)

    def drop_idle(self) -> LoadedAdapter | None:
        """Drop the one that no answer uses and whose last use is longest ago. None: each is in use."""
        with self._lock:
            idle = next((adapter for adapter, answers in self._answers.items() if not answers), None)
            if idle is not None:
                del self._answers[idle]
        if idle is not None:
            self._free(idle)
        return idle

    def use(self, adapter: LoadedAdapter | None, answers: int) -> None:
        """Keep it for so many answers; None is the model's own, which stays. Raises AdapterDroppedError."""
        if adapter is None:
            return
        with self._lock:
            if adapter not in self._answers:
                raise AdapterDroppedError(adapter.name)
            self._answers[adapter] = self._answers.pop(adapter) + answers

    def leave(self, adapter: LoadedAdapter | None, answers: int) -> None:
        """So many of its answers have ended."""
        if adapter is None:
            return
        with self._lock:
            users = self._answers if adapter in self._answers else self._dropped
            users[adapter] -= answers
            unused = users is self._dropped and not users[adapter]
            if unused:
                del users[adapter]
        if unused:
            self._free(adapter)

    def _free(self, adapter: LoadedAdapter) -> None:
        self._between_rounds(lambda: self._engine.drop_adapter(adapter))
