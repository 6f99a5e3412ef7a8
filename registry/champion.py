"""The champion, opened: registry, bundle, engine, policies and traces put together. Neither torch nor MLflow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.domains.returns.policies import Policy
from twinloop.domains.returns.prompt import Order
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry.smoke_test import prove
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import CHAMPION, Registry, Served
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine import Engine
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.model_manager import ModelManager, Refusal
from twinloop.serving.retrieval import PolicyIndex
from twinloop.serving.returns import RETURNS
from twinloop.serving.traces import TraceStore

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""Reading the alias from the project's own database takes 2 ms."""
ASK_EVERY_S = 10.0
"""Asking an MLflow server takes longer, and others ask it too."""
RETRY_EVERY_S = 5.0
"""A champion that was refused is read and hashed again at each try."""


def open_policies(project: Path) -> PolicyIndex:
    """The policies in force; an index that is still empty starts with those of the data set."""
    index = PolicyIndex(project / "state" / "policies.jsonl")
    if not index.path.exists() and (policies := _policies_of(project / "data")):
        index.seed(policies)
    return index


def _policies_of(data: Path) -> list[Policy]:
    """The good rows of the data set's policies; none where there is no data set yet."""
    from twinloop.domains.returns import domain
    from twinloop.records.reading import data_files  # polars takes a second: only for an empty index
    from twinloop.records.validation import check_rows

    records = [
        record
        for path in data_files(data, "documents")
        for record in check_rows(path, domain.record_types()["documents"]).frame.iter_rows(named=True)
    ]
    return [Policy(record["document_id"], record["text"]) for record in records]


@contextmanager
def open_champion(project: Path, name: str, *, slots: int = 8) -> Iterator[ModelManager[Order]]:
    """Verify the champion's bytes, load it, and close what answers at the end. Raises UserError where there is none."""
    served = Registry(Mlruns(project / "mlruns"), name).resolve(CHAMPION)
    traces = TraceStore(project / "state" / "traces")
    try:
        # Referred to by `manager` alone: the memory of a model that was replaced is freed.
        manager = ModelManager(_load(served, open_policies(project), traces, slots))
        try:
            yield manager
        finally:
            manager.service.scheduler.close()
    finally:
        traces.close()


@contextmanager
def following_champion(registry: Registry, manager: ModelManager[Order], *, slots: int) -> Iterator[None]:
    """Meanwhile, what is promoted or rolled back to is what answers, within a few seconds."""
    over = threading.Event()
    every_s = LOOK_EVERY_S if registry.mlruns.local_database else ASK_EVERY_S

    def follow() -> None:
        while not over.wait(RETRY_EVERY_S if manager.refusal else every_s):
            follow_champion(registry, manager, slots=slots)

    thread = threading.Thread(target=follow, name="champion", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def follow_champion(registry: Registry, manager: ModelManager[Order], *, slots: int) -> None:
    """Serve the version that is champion now, once it loads and answers; else the one that serves goes on."""
    current = manager.service
    try:
        champion = registry.snapshot().alias(CHAMPION)
    except Exception as error:  # whatever it is: the customers of the model that answers are not to feel it
        log.warning("the registry cannot be read, version %s goes on: %s", current.model.version, error)
        return
    if champion is None or str(champion.version) == current.model.version:
        manager.refusal = None
        return
    version = str(champion.version)
    try:
        manager.replace(_load(registry.verify(champion), current.index, current.traces, slots))
        log.info("%s answers now, after version %s", champion, current.model.version)
    except Exception as error:  # as above
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        refusal = Refusal(version, " ".join(reason.split()))
        if refusal != manager.refusal:
            words = "version %s is not served, version %s goes on: %s"
            log.warning(words, version, current.model.version, refusal.reason)
        manager.refusal = refusal


def _load(served: Served, index: PolicyIndex, traces: TraceStore | None, slots: int) -> DecisionService[Order]:
    tokenizer, engine = ChatTokenizer.load(served.path), Engine.load(served.path, slots=slots)
    prove(engine, tokenizer, served.path)
    model = ModelInfo(name=served.name, version=str(served.version), digest=served.digest)
    return DecisionService(Scheduler(engine), tokenizer, index, model, RETURNS, traces)
