"""A project whose network labels words: what it is made of, and its forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twinloop.evaluation.parity_report import ParityReport
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context
from twinloop.tasks.export import export_stage
from twinloop.tasks.measure import Workload
from twinloop.tasks.parity import FormMaker, Release, compare_forms
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.training.runtime import Runtime

LABELS = Path(__file__).parents[2] / "evaluation" / "labels.py"
SETTINGS = EvaluateSettings(max_new_tokens=8)
RUNTIME = Runtime(seed=1, threads=1, device="cpu")
ANSWERS = {"late": "delivery", "twice": "billing", "prize": "spam", "lost": "delivery", "refund": "billing"}
LIMITS = {
    "parity_logit_gap": 0.05, "parity_token_agreement": 0.99,
    "parity": {
        "network": {"stop_changes": 0, "stopped": 1},
        "fp32": {"tokens": 0.99, "logit_gap": 0.05, "verdict_changes": 0, "prompt_changes": 0, "stop_changes": 0,
                 "stopped": 1},
    },
}  # fmt: skip


def prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "label it"}, {"role": "user", "content": text}]


def stored(
    context: Context, stage: str, settings: dict[str, str], fill: Callable[[Path], dict[str, Any] | None]
) -> Artifact:
    def build(out: Path, keep: Path) -> dict[str, Any]:
        return fill(out) or {}

    return context.store.run(stage, settings=settings, inputs={}, code="", build=build)


def exported(context: Context, model: Artifact, precision: str = "fp32") -> Artifact:
    return export_stage(context, precision, 64, model=model)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def compared(context: Context, data: Artifact, release: Release, *forms: str) -> ParityReport:
    with TemporaryDirectory() as folder:
        return compare_forms(FormMaker(release, Path(folder), 1), Workload(context.domain, SETTINGS, data.path), forms)
