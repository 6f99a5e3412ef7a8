"""Which model answers now, and the change to another one while requests go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from twinloop.serving.decisions import DecisionService
from twinloop.serving.engine.scheduler import Scheduler, SchedulerClosedError, Totals

T = TypeVar("T")


@dataclass(frozen=True)
class ServeFailure:
    """A version that was to be served, and why the one before it goes on. The reason may name files: it is for logs."""

    version: str
    reason: str


class ModelManager:
    """Holds the service that answers now. Safe for many threads; one of them replaces it."""

    def __init__(self, service: DecisionService):
        self.service = service
        self.failure: ServeFailure | None = None
        self._lock = threading.Lock()
        self._working: list[Scheduler] = [service.scheduler]
        self._ended = Totals()

    def submit(self, work: Callable[[DecisionService], T]) -> T:
        """Hand a request to the service that answers now. Raises what `work` raises.

        A service that is replaced in this very moment takes no more, and the request goes to its successor.
        """
        while True:
            service = self.service
            try:
                return work(service)
            except SchedulerClosedError:
                if service is self.service:
                    raise

    def replace(self, service: DecisionService) -> None:
        """Answer every later request with `service`; return when the last answer of the one before is complete."""
        with self._lock:
            old, self.service, self.failure = self.service, service, None
            self._working.append(service.scheduler)
        old.scheduler.close()
        with self._lock:
            self._working.remove(old.scheduler)
            self._ended += old.scheduler.metrics().totals

    def totals(self) -> Totals:
        """What all models have done since the start."""
        with self._lock:
            return sum((scheduler.metrics().totals for scheduler in self._working), self._ended)
