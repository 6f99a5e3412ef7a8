"""The release gate as a stage: the rules, on what was measured of the exported model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefect import task

from twinloop.evaluation.case_report import CaseReport, Comparison
from twinloop.evaluation.cases import compare
from twinloop.evaluation.gate import GateReport, GateRules, judge
from twinloop.evaluation.rules import Measurements
from twinloop.registry.artifact import Artifact
from twinloop.tasks.baseline import Baseline
from twinloop.tasks.context import Context, Report
from twinloop.tasks.measure import read_case_report
from twinloop.tasks.parity import read_parity

if TYPE_CHECKING:
    from twinloop.evaluation.parity_report import ParityReport

GATE_REPORT = "gate.json"


def gate_stage(
    context: Context,
    rules: GateRules,
    *,
    exported: Artifact,
    evaluation: Artifact,
    parity: Artifact,
    baseline: Baseline,
    champion: Artifact | None,
) -> Artifact:
    """gate.json. champion: the evaluation of the baseline's version, where there is one."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        verdict = judge(
            rules,
            measurements(
                read_case_report(evaluation),
                evaluation.metrics,
                read_parity(parity),
                exported.metrics["precision"],
                baseline,
                champion,
            ),
            candidate=exported.digest,
        )
        (out / GATE_REPORT).write_text(verdict.to_json())
        return {"decision": verdict.decision, "reasons": [reason.reason for reason in verdict.reasons]}

    inputs = {"exported": exported, "evaluation": evaluation, "parity": parity}
    inputs |= {"champion": champion} if champion else {}
    version = baseline.version
    settings: dict[str, Any] = {"rules": dict(rules.limits), "champion_version": version.version if version else None}
    settings |= {"champion_note": baseline.note, "champion_damaged": baseline.damaged} if baseline.note else {}
    modules = ("twinloop.tasks.gate",)
    return context.run("gate", work, settings=settings, inputs=inputs, modules=modules, uses_domain=True)


gate = task(name="gate", persist_result=False)(gate_stage)


def measurements(
    cases: CaseReport,
    metrics: Mapping[str, Any],
    parity: ParityReport | None,
    served: str,
    baseline: Baseline,
    champion: Artifact | None,
) -> Measurements:
    """What the rules look at. metrics: of the evaluation. parity: None where there is no network any more to compare
    with. served: the precision of the exported model. champion: the evaluation of the baseline's version."""
    compared: Comparison | Literal["none"] | None = None if baseline.damaged else "none"
    if champion and baseline.version:
        compared = compare(cases, read_case_report(champion), version=str(baseline.version.version))
    candidate = parity.of(served) if parity else None
    return Measurements.of_cases(
        cases,
        champion=compared,
        champion_note=baseline.note,
        parity={form.form: form for form in parity.forms} if parity else {},
        missing_forms=parity.missing if parity else {},
        parity_logit_gap=candidate.logit_gap if candidate else None,
        parity_token_agreement=candidate.tokens if candidate else None,
        p95_ttft_ms=metrics["p95_ttft_ms"],
        memory_gib=metrics["memory_gib"],
    )


def read_gate_report(artifact: Artifact) -> GateReport:
    return GateReport.from_json((artifact.path / GATE_REPORT).read_bytes())
