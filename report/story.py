"""What a lifecycle made of a model, as plain data: read from its artifacts and from MLflow once, at its end.

Curves of training are read from MLflow and not from the artifacts: a file of them in a stage's output would be a part
of its content hash, by which lineage and the registry know a checkpoint.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from twinloop.evaluation.case_report import CaseFailure, CaseSample
from twinloop.evaluation.gate import GateReport
from twinloop.evaluation.metrics import Estimate, Rate
from twinloop.evaluation.parity_report import ParityReport

Curve = list[tuple[int, float]]
"""(step, value)."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Record):
    """What a model can do, on the cases that it was measured on."""

    overall: Rate
    by_kind: dict[str, Rate]
    by_predicate: dict[str, Rate]
    samples: tuple[CaseSample, ...]
    metrics: dict[str, float]
    measured: dict[str, Estimate] = {}
    """The domain's own metrics with their intervals; none in stories from before there were any."""


class Stage(_Record):
    """One stage, as the summary table has it."""

    name: str
    seconds: float | None
    reused: bool
    """It was made before this lifecycle, which only verified its bytes."""
    note: str
    run_id: str | None
    """MLflow's run that made it."""
    version: int | None
    key: str | None
    digest: str | None
    inputs: tuple[str, ...]
    """The stages whose artifacts it read."""
    metrics: dict[str, float]
    curves: dict[str, Curve]
    """Metrics of training by step; at most some hundred points each."""
    measured: Measured | None


class Load(_Record):
    """How it serves, as the load test found."""

    ttft_ms: tuple[float, ...]
    answer_ms: tuple[float, ...]
    tokens_per_s: float
    memory_gib: float


class DataFile(_Record):
    name: str
    kept: int
    quarantined: int


class Task(_Record):
    """What the model is for, as its domain says."""

    domain: str
    about: str
    predicates: dict[str, str]
    """Titles by name, as are kinds."""
    kinds: dict[str, str]
    metrics: dict[str, str] = {}
    """Titles of the metrics of `Measured.measured`."""
    route: str
    """Of the API, that answers `example`."""
    example: dict[str, Any]


class Story(_Record):
    """Everything that the figures, the tables and the page show."""

    model: str
    version: int
    title: str
    """Of the lifecycle: its name in MLflow."""
    started: str
    recipe_path: str
    recipe: dict[str, Any]
    task: Task
    code: str
    dataset_digest: str | None
    data: tuple[DataFile, ...]
    stages: tuple[Stage, ...]
    gate: GateReport
    parity: ParityReport | None = None
    """Every form of the release against the network; None in stories from before they were compared."""
    promoted: bool
    outcome: str
    """What became of the version, in a line."""
    outcomes: dict[str, dict[str, int]]
    """Confusion matrix of the exported model: by the right outcome and the answered one."""
    confidences: tuple[tuple[float, bool], ...]
    """(probability of the answer under the model, whether it passed) of each case."""
    failures: tuple[CaseFailure, ...]
    load: Load | None
    mlflow_run: str
    mlflow_experiment: str
    pages: dict[str, str]
    """Where it can be looked at: URLs by the tool's name."""

    @property
    def evaluation(self) -> Measured | None:
        """Of the exported model on every case."""
        return next((stage.measured for stage in reversed(self.stages) if stage.measured), None)

    @property
    def measured(self) -> list[tuple[str, Measured]]:
        """(stage, what its model can do), in order."""
        return [(stage.name, stage.measured) for stage in self.stages if stage.measured]
