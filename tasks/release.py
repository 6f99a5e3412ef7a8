"""A registered version before the gate, measured anew: nothing is taken from what was measured earlier but its parity,
which is a fact of the export."""

from __future__ import annotations

import tempfile
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.common.errors import UserError
from twinloop.evaluation.cases import CaseReport
from twinloop.evaluation.gate import GateReport, GateRules, judge
from twinloop.registry.artifact import MANIFEST, Artifact, Manifest
from twinloop.registry.promotion import record_gate
from twinloop.registry.versions import Registry, Version
from twinloop.tasks.context import Context
from twinloop.tasks.evaluate import evaluate, evaluate_bundle
from twinloop.tasks.gate import measurements, version_to_beat
from twinloop.tasks.measure import REPORT
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.tasks.runtime import Runtime


def version_to_judge(registry: Registry, *aliases: str) -> Version:
    """What the first of `aliases` that names a version names. Raises UserError where none does."""
    snapshot = registry.snapshot()
    version = next((found for alias in aliases if (found := snapshot.alias(alias))), None)
    if version is None:
        raise UserError(f"{registry.name}: no {' and no '.join(aliases)} to judge; `twinloop run` makes one")
    return version


@task(name="check-release", cache_policy=NO_CACHE)
def check_release(
    context: Context,
    settings: EvaluateSettings,
    runtime: Runtime,
    rules: GateRules,
    *,
    version: int,
    data: Artifact,
) -> GateReport:
    """Judge that version now, and keep the report with it. Raises UserError where it is not there, or damaged."""
    registry = Registry(context.mlruns, context.recipe)
    judged = registry.version(version)
    registry.verify(judged)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)

        def progress(done: float, total: float) -> None:
            context.progress.stepped("evaluate", done, total, {})

        context.progress.started("evaluate")
        metrics = evaluate_bundle(settings, runtime, data=data, bundle=judged.path, out=out, on_progress=progress)
        cases = CaseReport.model_validate_json((out / REPORT).read_bytes())
    rival = version_to_beat(registry, judged.digest)
    beaten = (
        evaluate.fn(context, settings, runtime, data=data, bundle=rival.path, digest=rival.digest) if rival else None
    )
    exported = Manifest.read(judged.path / MANIFEST).metrics
    measured = measurements(cases, metrics, exported, beaten, rival.version if rival else None)
    report = judge(rules, measured, candidate=judged.digest)
    record_gate(registry, judged, report)
    return report
