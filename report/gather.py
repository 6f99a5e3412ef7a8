"""Read the story of a lifecycle from what its stages made."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twinloop.common.errors import one_line
from twinloop.domains.domain import Domain
from twinloop.evaluation.gate import GateReport
from twinloop.evaluation.rules import metrics_of
from twinloop.models.directory import load_config
from twinloop.registry.artifact import Artifact
from twinloop.registry.smoke_test import example_call
from twinloop.registry.snapshot import Version
from twinloop.registry.tracking import RESUMES, Mlruns
from twinloop.registry.versions import Registry
from twinloop.report.rows import StageRow
from twinloop.report.story import Curve, DataFile, Load, Measured, Stage, Story, Task
from twinloop.tasks.context import SPEED, Context
from twinloop.tasks.measure import read_case_report
from twinloop.tasks.parity import read_parity
from twinloop.tasks.recipe import Recipe

log = logging.getLogger(__name__)

POINTS = 300
"""Of a curve: more are not seen in a figure of this size."""


@dataclass(frozen=True)
class Ending:
    """How a lifecycle ended. outcome: in a line."""

    gate: GateReport
    version: Version
    promoted: bool
    outcome: str


@dataclass(frozen=True)
class LifecycleRun:
    """The lifecycle's own MLflow run. started: local time, as text. pages: URLs by the tool's name."""

    run_id: str
    title: str
    started: str
    pages: dict[str, str]


def gather(context: Context, recipe: Recipe, rows: Sequence[StageRow], ending: Ending, run: LifecycleRun) -> Story:
    """The whole story. What MLflow does not have any more, such as the curves of a lost run, is left out."""
    registry = Registry(context.mlruns, context.recipe)
    versions = [*registry.checkpoints.snapshot().versions.values(), *registry.snapshot().versions.values()]
    by_digest = {version.digest: version.version for version in versions}
    stages = tuple(_stage(row, context.mlruns, by_digest) for row in rows)
    artifacts = {row.artifact.stage: row.artifact for row in rows if row.artifact}
    evaluation = artifacts["evaluate"]
    cases = read_case_report(evaluation)
    results = [(each.confidence, each.passed) for each in cases.results if each.confidence is not None]
    return Story(
        model=context.recipe,
        version=ending.version.version,
        title=run.title,
        started=run.started,
        recipe_path=str(context.recipe_path or ""),
        recipe=recipe.plain(),
        task=_task(context.domain, load_config(artifacts["export"].path).labels),
        code=str(context.code),
        dataset_digest=context.dataset_digest,
        data=_data(artifacts["validate"]),
        stages=stages,
        gate=ending.gate,
        parity=read_parity(artifacts["parity"]),
        promoted=ending.promoted,
        outcome=ending.outcome,
        outcomes=cases.outcomes,
        confidences=tuple((confidence, passed) for confidence, passed in results),
        failures=cases.failures,
        load=Load.model_validate({name: evaluation.metrics[name] for name in Load.model_fields}),
        mlflow_run=run.run_id,
        mlflow_experiment=context.mlruns.experiment_id(context.recipe),
        pages=run.pages,
    )


def _task(domain: Domain, labels: Sequence[str]) -> Task:
    route, example = example_call(domain, labels)
    return Task(
        domain=domain.name,
        about=domain.description,
        predicates={name: predicate.title for name, predicate in domain.predicates.items()},
        kinds={name: kind.title for name, kind in domain.case_kinds.items()},
        metrics={name: metric.title for name, metric in metrics_of(domain).items()},
        route=route.removeprefix("/"),
        example=example,
    )


def _data(validated: Artifact) -> tuple[DataFile, ...]:
    files = json.loads((validated.path / "report.json").read_bytes())["files"]
    return tuple(
        DataFile(name=name, kept=file["kept"], quarantined=file["quarantined"]) for name, file in files.items()
    )


def _stage(row: StageRow, mlruns: Mlruns, versions: dict[str, int]) -> Stage:
    artifact = row.artifact
    run_id = artifact.metrics.get("mlflow_run_id") if artifact else None
    trained = artifact is not None and "initial_loss" in artifact.metrics
    return Stage(
        name=row.name,
        seconds=row.seconds,
        reused=row.reused,
        note=row.note,
        run_id=run_id,
        version=versions.get(artifact.digest) if artifact else None,
        key=artifact.key if artifact else None,
        digest=artifact.digest if artifact else None,
        inputs=tuple(each.stage for each in artifact.manifest.inputs.values() if each.stage) if artifact else (),
        metrics=_numbers(artifact.metrics) if artifact else {},
        curves=curves_of(mlruns, run_id) if run_id and trained else {},
        measured=_measured(row.measured) if row.measured else None,
    )


def _measured(artifact: Artifact) -> Measured:
    report = read_case_report(artifact)
    return Measured(
        overall=report.overall,
        by_kind=report.by_kind | report.pairs,
        by_predicate=report.by_predicate if report.results else {},
        samples=report.samples,
        metrics=_numbers(artifact.metrics),
        measured=report.measured,
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def curves_of(mlruns: Mlruns, run_id: str) -> dict[str, Curve]:
    """Of the run, and of those that were killed before and that it resumed."""
    from mlflow.exceptions import MlflowException

    client, resumed = mlruns.client, run_id
    steps: dict[str, dict[int, float]] = {}
    try:
        while resumed:
            run = client.get_run(resumed)
            for name in run.data.metrics:
                # A stage's totals have step 0: they are no curve. What a resumed run did again counts once.
                values = {
                    each.step: each.value
                    for each in client.get_metric_history(resumed, name)
                    if each.step and math.isfinite(each.value)
                }
                steps[name] = values | steps.get(name, {})
            resumed = run.data.tags.get(RESUMES, "")
    except MlflowException as trouble:
        log.warning("no curves of run %s: %s", run_id, one_line(trouble))
    return {
        name: _thinned(sorted(values.items())) for name, values in steps.items() if len(values) > 1 and name != SPEED
    }


def _thinned(curve: Curve) -> Curve:
    """At most POINTS of a curve: the mean of each stretch, at its last step. Six digits are more than are seen."""
    size = -(-len(curve) // POINTS)
    stretches = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(part[-1][0], float(f"{sum(value for _, value in part) / len(part):.6g}")) for part in stretches]
