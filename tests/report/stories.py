"""A story as a lifecycle tells it, small enough to be read."""

from __future__ import annotations

from typing import Any

from twinloop.evaluation.case_report import CaseFailure, CaseSample
from twinloop.evaluation.gate import Check, GateReport, Reason
from twinloop.evaluation.metrics import Estimate, Rate
from twinloop.evaluation.parity_report import FormParity, ParityReport
from twinloop.report.story import Curve, DataFile, Load, Measured, Stage, Story, Task

PROMPT = ({"role": "user", "content": "may I <b>return</b> order A10234 & keep it?"},)


def measured(passed: int, total: int = 20) -> Measured:
    rate = Rate(successes=passed, total=total)
    sample = CaseSample(
        case_id="held-1", kind="held_out", prompt=PROMPT, output=f"{passed} of", passed=True, expected={}
    )
    return Measured(
        overall=rate,
        by_kind={"held_out": rate, "golden": Rate(successes=0, total=0)},
        by_predicate={"parsed": Rate(successes=total, total=total), "eligible": rate},
        samples=(sample,),
        metrics={
            "pass_rate": rate.rate,
            "kind/held_out": rate.rate,
            "bits_per_byte": 1.25,
            "bits_per_byte_low": 1.2,
            "bits_per_byte_high": 1.3125,
            "p95_ttft_ms": 12.0,
        },
        measured={"macro_f1": Estimate(value=passed / total, interval=(0.125, 0.75)), "own": Estimate(value=3.0)},
    )


def stage(name: str, *inputs: str, **fields: Any) -> Stage:
    known: dict[str, Any] = {
        "seconds": 1.5,
        "reused": False,
        "note": "",
        "run_id": f"run-of-{name}",
        "version": None,
        "key": f"key-{name}",
        "digest": f"{name:0<64}",
        "metrics": {},
        "curves": {},
        "measured": None,
    }
    return Stage(name=name, inputs=inputs, **(known | fields))


def curve(*values: float) -> Curve:
    return list(enumerate(values, 1))


FAILURE = CaseFailure(
    case_id="held-2",
    kind="held_out",
    pair_id=None,
    prompt=PROMPT,
    output="<script>alert(1)</script>",
    finish_reason="stop",
    failed=("eligible",),
    reasons=("window | days",),
    expected={"eligible": True},
    owner="SFT data",
    next_action="look at `chat.jsonl`",
)


def compared(form: str, **changes: object) -> FormParity:
    """A form that answers as the network does, some of it changed."""
    alike = {"tokens": 1.0, "logit_gap": 1e-6, "verdict_changes": 0, "prompt_changes": 0, "stop_changes": 0}
    alike |= {"form": form, "digest": f"digest of {form}", "compared": 200, "stopped": 1.0}
    return FormParity(**(alike | changes))


PARITY = ParityReport(
    cases=("held-1", "held-2"),
    cases_digest="cases",
    forms=(
        compared("network", reference=True, logit_gap=0.0),
        compared("fp32"),
        compared(
            "int8", tokens=0.985, logit_gap=0.5, verdict_changes=1, problems={"verdict_changes": ("case flip-9 fails",)}
        ),
    ),
    missing={"gguf": "there is <no> file"},
)


def story(**changes: Any) -> Story:
    """Two stages of training, a blocked gate, one failure."""
    dpo = {"loss": curve(0.69, 0.6, 0.5), "margin": curve(0, 1, 2), "own_metric": curve(3, 2, 1)}
    checks = (
        Check(rule="held_out_pass_rate", outcome="block", measured=0.5, bound="at least", limit=0.9, detail="50%"),
        Check(rule="memory_gib", outcome="pass", measured=0.1, bound="at most", limit=4, detail=""),
        Check(rule="champion_net_loss", outcome="skipped", measured=None, bound="at most", limit=0.02, detail="none"),
    )
    reason = Reason(
        rule="held_out_pass_rate", reason="quality below its limit", owner="SFT data", measured=0.5, limit=0.9
    )
    known: dict[str, Any] = {
        "model": "returns",
        "version": 7,
        "title": "returns 2026-11-26 04:10",
        "started": "2026-11-26 04:10 UTC",
        "recipe_path": "recipes/returns.yaml",
        "recipe": {"name": "returns", "base": {"depth": 4}},
        "task": Task(
            domain="returns",
            about="Return decisions.",
            predicates={"parsed": "JSON", "eligible": "eligible"},
            metrics={"macro_f1": "macro F1", "own": "own <metric>", "other": "never measured"},
            kinds={"held_out": "held-out cases", "golden": "regression cases"},
            route="v1/decisions",
            example={"message": "it's broken"},
        ),
        "code": "c0ffee",
        "dataset_digest": "d41d8cd9.dir",
        "data": (DataFile(name="chat", kept=8000, quarantined=2),),
        "stages": (
            stage("validate", reused=True),
            stage("sft", "validate", version=1, curves={"loss": curve(2, 1, 0.5)}, measured=measured(5)),
            stage("audit", "validate"),
            stage("dpo", "validate", "sft", "audit", version=2, curves=dpo, measured=measured(9)),
            stage("export fp32", "dpo", version=7, metrics={"parameters": 930_000.0, "bytes": 2.0**22}),
            stage("export int8", "dpo", version=6),
            stage("parity", "validate", "dpo", "export", "export"),
            stage("evaluate", "export", measured=measured(10)),
            stage("gate", "evaluate", "export", "parity"),
        ),
        "parity": PARITY,
        "gate": GateReport(
            decision="BLOCK", reasons=(reason,), checks=checks, candidate="digest", rules_digest="rules"
        ),
        "promoted": False,
        "outcome": "returns version 7 was not promoted: gate: BLOCK",
        "outcomes": {"yes": {"yes": 8, "no": 1, "no answer": 1}, "no": {"yes": 2, "no": 8, "no answer": 0}},
        "confidences": ((0.95, True), (0.9, True), (0.15, False)),
        "failures": (FAILURE,),
        "load": Load(ttft_ms=(1.0, 2.0, 12.0), answer_ms=(9.0, 20.0, 30.0), tokens_per_s=900.0, memory_gib=0.1),
        "mlflow_run": "0123456789abcdef",
        "mlflow_experiment": "1",
        "pages": {
            "MLflow": "http://127.0.0.1:5000/#/experiments/1",
            "Prefect": "http://127.0.0.1:4200/runs/flow-run/1",
        },
    }
    return Story(**(known | changes))
