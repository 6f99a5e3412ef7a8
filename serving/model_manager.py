"""Which model answers now, and the change to another one while requests go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from twinloop.serving.decisions import DecisionService
from twinloop.serving.engine.counts import Totals
from twinloop.serving.engine.held_adapters import AdapterDroppedError
from twinloop.serving.engine.scheduler import Scheduler, SchedulerClosedError
from twinloop.serving.named import NamedModels, NamedVersion, find_named

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

    def __init__(self, service: DecisionService, others: NamedModels | None = None):
        """others: versions on the base of the service's model, where it takes adapters."""
        self._serving = service, others
        self.failure: ServeFailure | None = None
        self.unknown_champion: Literal["no_champion", "registry_unreadable"] | None = None
        """Why the registry names no champion at the moment, if it does not."""
        self._lock = threading.Lock()
        self._working: list[Scheduler] = [service.scheduler]
        self._ended = Totals()

    @property
    def service(self) -> DecisionService:
        """What answers requests that name no version."""
        return self._serving[0]

    def find(self, name: str | None) -> NamedVersion | None:
        """The version that a request names; None for the served model itself. Raises ApiError for a name that no model
        has here."""
        return find_named(*self._serving, name)

    def listed(self) -> list[NamedVersion]:
        """Versions that requests may name beside the served model."""
        _, others = self._serving
        return others.listed() if others is not None else []

    @property
    def loaded(self) -> int | None:
        """How many of them are in memory; None where the served model takes no adapters."""
        service, others = self._serving
        return None if others is None else len(service.scheduler.adapters.held)

    def submit(self, work: Callable[[DecisionService], T], name: str | None = None) -> T:
        """Hand a request to the service that answers now, or to a version on its base. Raises what `work` raises, and
        ApiError for a name that no model has here.

        name: what the request calls the model. A service that is replaced in this very moment takes no more, and the
        request goes to its successor; an adapter that is dropped in this very moment is loaded again.
        """
        while True:
            service, others = self._serving
            try:
                version = find_named(service, others, name)
                if version is None or others is None:
                    return work(service)
                return work(others.service(version))
            except AdapterDroppedError:
                continue
            except SchedulerClosedError:
                if service is self.service:
                    raise

    def replace(self, service: DecisionService, others: NamedModels | None = None) -> None:
        """Answer every later request with `service`; the one before completes what it has begun, beside it."""
        with self._lock:
            old, self._serving = self.service, (service, others)
            self.failure = self.unknown_champion = None
            self._working.append(service.scheduler)
        old.scheduler.close(timeout_s=0.0)
        # In a thread of its own: it may take as long as a request, and the next version may be wanted before.
        threading.Thread(target=self._retire, args=(old.scheduler,), name="retired", daemon=True).start()

    def _retire(self, scheduler: Scheduler) -> None:
        scheduler.close()
        with self._lock:
            self._working.remove(scheduler)
            self._ended += scheduler.metrics().totals

    @property
    def draining(self) -> bool:
        """Whether a replaced version, which needs memory too, still completes what it has begun."""
        return len(self._working) > 1

    def close(self) -> None:
        """Take no more requests; return when the last answer of every version is complete."""
        with self._lock:
            working = list(self._working)
        for scheduler in working:
            scheduler.close()

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
