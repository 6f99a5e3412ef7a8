"""Which model answers now, and the change to another one while requests go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from twinloop.serving.decisions import DecisionService
from twinloop.serving.engine.scheduler import Scheduler, SchedulerClosedError, Totals

T = TypeVar("T")


REFUSED = "it is corrupt, or does not load and answer, and it is not used; the server's log gives the reason"

Degradation = Literal["champion_refused", "no_champion", "registry_unreadable", "documents_differ"]
DEGRADATIONS: tuple[Degradation, ...] = get_args(Degradation)


@dataclass(frozen=True)
class ServeFailure:
    """A version that was to be served, and why the one before it goes on. The reason may name files: it is for logs;
    `public` is for clients."""

    version: str
    reason: str
    public: str = REFUSED


class ModelManager:
    """Holds the service that answers now. Safe for many threads; one of them replaces it."""

    def __init__(self, service: DecisionService):
        self.service = service
        self.failure: ServeFailure | None = None
        self.unknown_champion: Literal["no_champion", "registry_unreadable"] | None = None
        """Why the registry names no champion at the moment, if it does not."""
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
            old, self.service, self.failure, self.unknown_champion = self.service, service, None, None
            self._working.append(service.scheduler)
        old.scheduler.close()
        with self._lock:
            self._working.remove(old.scheduler)
            self._ended += old.scheduler.metrics().totals

    def totals(self) -> Totals:
        """What all models have done since the start."""
        with self._lock:
            return sum((scheduler.metrics().totals for scheduler in self._working), self._ended)

    def degraded(self) -> dict[Degradation, str]:
        """What is not as it should be though requests are answered, in words for clients.

        Raises DocumentStoreError where the documents cannot be read.
        """
        service, failure = self.service, self.failure
        version, found = service.model.version, dict[Degradation, str]()
        if failure is not None:
            found["champion_refused"] = (
                f"version {failure.version} is the champion, and version {version} answers: {failure.public}"
            )
        elif self.unknown_champion == "no_champion":
            found["no_champion"] = f"no version is the champion any more; version {version} goes on"
        elif self.unknown_champion == "registry_unreadable":
            found["registry_unreadable"] = (
                f"the registry cannot be read, so version {version} goes on whether or not it is still the champion"
            )
        if service.documents_differ:
            found["documents_differ"] = (
                f"the documents are not those that version {version} was trained and evaluated with"
            )
        return found
