"""A registered version before the gate, measured anew. Only parity, a fact of the bytes, is not measured twice."""

from __future__ import annotations

import logging

from prefect import task

from twinloop.common.errors import UserError
from twinloop.evaluation.gate import GateReport, GateRules, judge
from twinloop.models.config import Precision
from twinloop.models.directory import load_config
from twinloop.registry.artifact import MANIFEST, Artifact, Manifest
from twinloop.registry.cards import describe
from twinloop.registry.fingerprint import module_fingerprint
from twinloop.registry.gates import record_gate
from twinloop.registry.promotion import open_ledger
from twinloop.registry.snapshot import DOMAIN_FINGERPRINT, Version
from twinloop.registry.versions import Registry
from twinloop.tasks.baseline import find_baseline
from twinloop.tasks.context import Context
from twinloop.tasks.evaluate import evaluate_exported, evaluate_stage
from twinloop.tasks.gate import measurements
from twinloop.tasks.measure import Workload
from twinloop.tasks.parity import Release, parity_stage, read_parity
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.training.runtime import Runtime

log = logging.getLogger(__name__)


def version_to_judge(registry: Registry, *aliases: str) -> Version:
    """What the first of `aliases` that names a version names. Raises UserError where none does."""
    snapshot = registry.snapshot()
    version = next((found for alias in aliases if (found := snapshot.alias(alias))), None)
    if version is None:
        raise UserError(f"{registry.name}: no {' and no '.join(aliases)} to judge; `twinloop run` makes one")
    return version


def release_of(registry: Registry, version: Version) -> Release | None:
    """What the registry has of that release: the version, the checkpoint that it was exported from, and what else was
    exported from that, all verified. None where the checkpoint was deleted.

    Raises UserError where one of them is not what was registered.
    """
    checkpoint = registry.checkpoint_of(version)
    if checkpoint is None:
        return None
    exported = {precision_of(version): registry.verify(version)}
    for other in registry.checkpoints.snapshot().versions.values():
        if other.exported and other.parent == version.parent:
            exported.setdefault(precision_of(other), registry.verify(other))
    return Release(registry.verify(checkpoint), exported)


def precision_of(version: Version) -> Precision:
    """Of an exported model."""
    precision: Precision = Manifest.read(version.path / MANIFEST).metrics["precision"]
    return precision


def judge_version(
    context: Context,
    settings: EvaluateSettings,
    runtime: Runtime,
    rules: GateRules,
    *,
    version: int,
    data: Artifact,
) -> GateReport:
    """Judge that version now, and keep the report with it.

    Raises UserError where it is missing or changed, and for one that cannot be compared with the champion.
    """
    registry = Registry(context.mlruns, context.recipe)
    judged = registry.version(version)
    registry.verify(judged)
    baseline = find_baseline(registry, judged.digest, load_config(judged.path).kind, str(judged))

    def progress(done: float, total: float) -> None:
        context.progress.stepped("evaluate", done, total, {})

    context.progress.started("evaluate")
    workload = Workload(context.domain, settings, data.path)
    cases, metrics = evaluate_exported(judged.path, workload, runtime, progress)
    evaluated = (
        evaluate_stage(context, settings, runtime, data=data, exported=beaten.path, digest=beaten.digest)
        if (beaten := baseline.version)
        else None
    )
    release = release_of(registry, judged)
    parity = None
    if release is None:
        log.warning("%s: the checkpoint that it was exported from is gone: no form is compared with it", judged)
    else:
        forms = release.forms(rules.forms)
        parity = read_parity(parity_stage(context, settings, runtime, data=data, release=release, forms=forms))
    measured = measurements(cases, metrics, parity, precision_of(judged), baseline, evaluated)
    report = judge(rules, measured, candidate=judged.digest)
    registry.tag(judged, {DOMAIN_FINGERPRINT: module_fingerprint(context.loaded_domain.found)})
    record_gate(registry, judged, report)
    describe(registry, open_ledger(registry.mlruns).read(), judged.version)
    return report


check_release = task(name="check-release", persist_result=False)(judge_version)
