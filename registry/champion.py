"""The champion, opened: registry, domain, exported model, engine, documents and traces. Neither torch nor MLflow."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.domains.loader import LoadedDomain, load_domain
from twinloop.models.exported import describe_exported
from twinloop.models.label_tokenizer import load_answering
from twinloop.models.memory import NotEnoughMemoryError
from twinloop.registry.adapters import ASK_EVERY_S, LOOK_EVERY_S, RegisteredAdapters, measured_with_other_code
from twinloop.registry.documents import open_documents
from twinloop.registry.promotion import open_ledger
from twinloop.registry.smoke_test import smoke_test_engine
from twinloop.registry.snapshot import DOCUMENTS_DIGEST, Served, Version
from twinloop.registry.versions import CHAMPION, Registry
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine import Engine
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.engine.session import usable_cores
from twinloop.serving.knowledge.documents import DocumentStore
from twinloop.serving.model_manager import REFUSED, ModelManager, ServeFailure
from twinloop.serving.named import NamedModels
from twinloop.serving.traces import TraceStore
from twinloop.serving.worker_process import WorkerProcess

log = logging.getLogger(__name__)

RETRY_EVERY_S = 5.0
"""A champion that was refused is read and hashed again at each try."""
STOP_WITHIN_S = 1.0
"""How long the end of a server waits for who follows the champion."""
NO_MEMORY_YET = "there is no memory for it before the version that was replaced has completed its last answers"
NOT_OURS = "it was not registered by Twinloop"
OTHER_CODE = "%s was measured with other code of its domain than %s has now: its gate report is not about this code"


@dataclass(frozen=True)
class Serving:
    """How this process serves a champion. slots: answers at the same time. adapters: other versions on the champion's
    base that may be in memory beside it, where it was exported with its adapter. process: this one, where it is one of
    several that serve at one address. on_death: as of a `Scheduler`."""

    slots: int = 8
    adapters: int = 0
    process: WorkerProcess | None = None
    on_death: Callable[[], None] = lambda: None

    @property
    def count(self) -> int:
        """Processes that serve at the address."""
        return 1 if self.process is None else self.process.count

    @property
    def starting(self) -> int:
        """Those that load their model beside this one at its start, this one included."""
        return 1 if self.process is None else self.process.starting

    @property
    def threads(self) -> int | None:
        """Of the engine: processes share the cores."""
        return None if self.process is None else max(1, usable_cores() // self.process.count)


def load_served_domain(version: Version, project: Path) -> LoadedDomain:
    """What a version is for. Raises UserError where the registry does not name it, or where it cannot be loaded."""
    name = version.domain
    try:
        return load_domain(name, project)
    except UserError as error:
        raise UserError(f"{version}: its domain cannot be loaded ({error})") from None


@contextmanager
def open_champion(project: Path, name: str, serving: Serving) -> Iterator[ModelManager]:
    """Verify the champion's bytes, load it, and close what answers at the end. Raises UserError where there is none."""
    registry = Registry.of(project, name)
    served = registry.resolve(CHAMPION)
    loaded = load_served_domain(served, project)
    domain = loaded.domain
    if measured_with_other_code(served, loaded):
        log.warning(OTHER_CODE, served, loaded.file)
    traces = TraceStore(project / "state" / "traces")
    try:
        # Held by the manager alone: a model that was replaced leaves memory.
        documents = open_documents(project, name, domain, served.dataset)
        manager = ModelManager(*_load(registry, served, loaded, documents, traces, serving, serving.starting))
        try:
            yield manager
        finally:
            manager.close()
            manager.service.documents.close()
    finally:
        traces.close()


@contextmanager
def following_champion(project: Path, registry: Registry, manager: ModelManager, serving: Serving) -> Iterator[None]:
    """Meanwhile, what is promoted or rolled back to is what answers, within a few seconds."""
    over = threading.Event()
    every_s = LOOK_EVERY_S if registry.mlruns.local_database else ASK_EVERY_S

    def follow() -> None:
        while not over.wait(RETRY_EVERY_S if manager.failure else every_s):
            follow_champion(project, registry, manager, serving)

    thread = threading.Thread(target=follow, name="champion", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(STOP_WITHIN_S)  # it may load a model, or wait for a registry that is away


def follow_champion(project: Path, registry: Registry, manager: ModelManager, serving: Serving) -> None:
    """Serve the version that is champion now, once it loads and answers; else the one that serves goes on."""
    current = manager.service
    try:
        snapshot = registry.snapshot()
    except Exception as error:  # whatever it is: the model that answers goes on
        manager.unknown_champion = "registry_unreadable"
        log.warning("the registry cannot be read, version %s goes on: %s", current.model.version, error)
        return
    champion = snapshot.alias(CHAMPION)
    manager.unknown_champion = None if CHAMPION in snapshot.aliases else "no_champion"
    if champion is None and CHAMPION in snapshot.aliases:
        _fail(manager, ServeFailure(str(snapshot.aliases[CHAMPION]), NOT_OURS, NOT_OURS))
        return
    # By its content too: a model that was deleted in MLflow and made again counts from 1.
    if champion is None or (str(champion.version), champion.digest) == (current.model.version, current.model.digest):
        manager.failure = None
        return
    version = str(champion.version)
    try:
        loaded = load_served_domain(champion, project)
        if loaded.domain is not current.domain:  # another one may have other routes and fields
            raise _RestartNeededError(
                f"{champion}: it is for another domain, {champion.domain}; start the server again to serve it",
                "it is for another domain, and this server has to be started again to serve it",
            )
        if measured_with_other_code(champion, loaded):
            if not _is_rolled_back_to(registry, champion.version):
                raise _RestartNeededError(
                    f"{champion}: it was measured with other code of its domain than this server has loaded from "
                    f"{loaded.file}; restart the server to serve it",
                    "it was measured with other code of its domain, and this server has to be started again to serve "
                    "it",
                )
            log.warning(OTHER_CODE, champion, loaded.file)
        served = registry.verify(champion)
        documents, traces = current.documents, current.traces
        # All processes load it, and each beside the version that it replaces.
        manager.replace(*_load(registry, served, loaded, documents, traces, serving, serving.count))
        log.info("%s answers now, after version %s", champion, current.model.version)
    except Exception as error:  # as above
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        public = error.public if isinstance(error, _RestartNeededError) else REFUSED
        if isinstance(error, NotEnoughMemoryError) and manager.draining:
            public = NO_MEMORY_YET
        _fail(manager, ServeFailure(version, " ".join(reason.split()), public))


def _fail(manager: ModelManager, failure: ServeFailure) -> None:
    """Note why a champion is not served; the log has it once, also where only a size in the reason changes."""
    before = manager.failure
    if before is None or (before.version, _words(before)) != (failure.version, _words(failure)):
        words = "version %s is not served, version %s goes on: %s"
        log.warning(words, failure.version, manager.service.model.version, failure.reason)
    manager.failure = failure


def _words(failure: ServeFailure) -> str:
    return re.sub(r"\d[\d,.]*", "", failure.reason)


class _RestartNeededError(UserError):
    """A champion that a server which runs already cannot take. public: why, in words for clients."""

    def __init__(self, message: str, public: str):
        super().__init__(message)
        self.public = public


def _is_rolled_back_to(registry: Registry, version: int) -> bool:
    """Whether a rollback made it the champion. Its commit may be written after the alias is moved."""
    moves = [entry for entry in open_ledger(registry.mlruns).read().entries if entry.model == registry.name]
    begun = [entry for entry in moves if entry.event in ("intent", "adopt")]
    return bool(begun) and (begun[-1].action, begun[-1].to_version) == ("rollback", version)


def _load(
    registry: Registry,
    served: Served,
    loaded: LoadedDomain,
    documents: DocumentStore,
    traces: TraceStore | None,
    serving: Serving,
    copies: int,
) -> tuple[DecisionService, NamedModels | None]:
    """What answers for the version, and what requests may name beside it: None where its model takes no adapters.

    copies: processes that load it at the same time, this one included.
    """
    tokenizer = load_answering(served.path)
    engine = Engine.load(served.path, slots=serving.slots, threads=serving.threads, copies=copies)
    smoke_test_engine(engine, tokenizer, loaded.domain, served.path)
    scheduler = Scheduler(engine, on_death=serving.on_death)
    model = ModelInfo(name=served.name, version=str(served.version), digest=served.digest)
    measured = served.tags.get(DOCUMENTS_DIGEST) or None
    service = DecisionService(scheduler, tokenizer, documents, model, loaded.domain, traces, measured)
    if not serving.adapters or not describe_exported(served.path).takes_adapters:
        return service, None
    return service, NamedModels(service, RegisteredAdapters(registry, served, loaded), most=serving.adapters)
