"""The champion, opened: registry, bundle, engine, policies and traces put together. Neither torch nor MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from domains.returns.policies import Policy
from domains.returns.prompt import Order
from models.tokenizer import ChatTokenizer
from serving.decisions import DecisionService, ModelInfo
from serving.engine import Engine
from serving.retrieval import PolicyIndex
from serving.returns import RETURNS
from serving.scheduler import Scheduler
from serving.traces import TraceStore
from tasks.registry import CHAMPION, Registry
from tasks.tracking import Mlruns


@dataclass(frozen=True)
class Champion:
    """Ready to answer."""

    service: DecisionService[Order]
    scheduler: Scheduler
    tokenizer: ChatTokenizer
    model: ModelInfo


def open_policies(project: Path) -> PolicyIndex:
    """The policies in force; an index that is still empty starts with those of the data set."""
    index = PolicyIndex(project / "state" / "policies.jsonl")
    if not index.path.exists() and (policies := _policies_of(project / "data")):
        index.seed(policies)
    return index


def _policies_of(data: Path) -> list[Policy]:
    """The good rows of the data set's policies; none where there is no data set yet."""
    from domains.returns.schemas import RECORD_TYPES  # pandera and polars take a second: only for an empty index
    from tasks.reading import data_files
    from tasks.validate import check_rows

    records = [
        record
        for path in data_files(data, "policies")
        for record in check_rows(path, RECORD_TYPES["policies"]).frame.iter_rows(named=True)
    ]
    return [Policy(record["policy_id"], record["text"]) for record in records]


@contextmanager
def open_champion(project: Path, name: str, *, slots: int = 8, threads: int | None = None) -> Iterator[Champion]:
    """Verify the champion's bytes, load it, and close it at the end. Raises UserError where there is none."""
    served = Registry(Mlruns(project / "mlruns"), name).resolve(CHAMPION)
    tokenizer = ChatTokenizer.load(served.path)
    model = ModelInfo(name=served.name, version=str(served.version), digest=served.digest)
    scheduler = Scheduler(Engine.load(served.path, slots=slots, threads=threads))
    traces = TraceStore(project / "state" / "traces")
    try:
        index = open_policies(project)
        yield Champion(
            DecisionService(scheduler, tokenizer, index, model, RETURNS, traces), scheduler, tokenizer, model
        )
    finally:
        scheduler.close()
        traces.close()
