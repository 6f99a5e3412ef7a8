"""A registered version before the gate, measured anew: nothing is taken from what was measured earlier but its parity,
which is a fact of the export."""

from __future__ import annotations

from prefect import task

from twinloop.common.errors import UserError
from twinloop.evaluation.gate import GateReport, GateRules, judge
from twinloop.registry.artifact import MANIFEST, Artifact, Manifest
from twinloop.registry.cards import describe
from twinloop.registry.fingerprint import module_fingerprint
from twinloop.registry.gates import record_gate
from twinloop.registry.promotion import open_ledger
from twinloop.registry.snapshot import DOMAIN_FINGERPRINT, Version
from twinloop.registry.versions import Registry
from twinloop.tasks.context import Context
from twinloop.tasks.evaluate import evaluate_exported, evaluate_stage
from twinloop.tasks.gate import measurements, version_to_beat
from twinloop.tasks.measure import Workload
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.training.runtime import Runtime


def version_to_judge(registry: Registry, *aliases: str) -> Version:
    """What the first of `aliases` that names a version names. Raises UserError where none does."""
    snapshot = registry.snapshot()
    version = next((found for alias in aliases if (found := snapshot.alias(alias))), None)
    if version is None:
        raise UserError(f"{registry.name}: no {' and no '.join(aliases)} to judge; `twinloop run` makes one")
    return version


def judge_version(
    context: Context,
    settings: EvaluateSettings,
    runtime: Runtime,
    rules: GateRules,
    *,
    version: int,
    data: Artifact,
) -> GateReport:
    """Judge that version now, and keep the report with it. Raises UserError where it is missing or changed."""
    registry = Registry(context.mlruns, context.recipe)
    judged = registry.version(version)
    registry.verify(judged)

    def progress(done: float, total: float) -> None:
        context.progress.stepped("evaluate", done, total, {})

    context.progress.started("evaluate")
    workload = Workload(context.domain, settings, data.path)
    cases, metrics = evaluate_exported(judged.path, workload, runtime, progress)
    baseline = version_to_beat(registry, judged.digest)
    evaluated = (
        evaluate_stage(context, settings, runtime, data=data, exported=baseline.path, digest=baseline.digest)
        if baseline
        else None
    )
    exported = Manifest.read(judged.path / MANIFEST).metrics
    measured = measurements(cases, metrics, exported, evaluated, baseline.version if baseline else None)
    report = judge(rules, measured, candidate=judged.digest)
    registry.tag(judged, {DOMAIN_FINGERPRINT: module_fingerprint(context.loaded_domain.found)})
    record_gate(registry, judged, report)
    describe(registry, open_ledger(registry.mlruns).read(), judged.version)
    return report


check_release = task(name="check-release", persist_result=False)(judge_version)
