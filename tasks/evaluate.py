"""Evaluation of an exported model, in the engine that will serve it: every case, held-out text, speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, OnProgress, Report
from twinloop.tasks.measure import Workload, measure_engine, write_cases
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.training.runtime import Runtime

if TYPE_CHECKING:
    from twinloop.evaluation.case_report import CaseReport

SERVED_PROMPTS = 64


def evaluate_stage(
    context: Context,
    settings: EvaluateSettings,
    runtime: Runtime,
    *,
    data: Artifact,
    exported: Path,
    digest: Artifact | str,
) -> Artifact:
    """cases.json and what the gate looks at. `digest` names the content of the directory `exported`."""
    workload = Workload(context.domain, settings, data.path)

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        cases, metrics = evaluate_exported(exported, workload, runtime, report.moved)
        write_cases(out, cases)
        return metrics

    return context.run(
        "evaluate",
        work,
        settings={**settings.model_dump(exclude={"stage_cases"}), "threads": runtime.threads},
        inputs={"data": data, "exported": digest},
        modules=("twinloop.tasks.evaluate",),
        uses_domain=True,
    )


evaluate = task(name="evaluate", persist_result=False)(evaluate_stage)


def evaluate_exported(
    exported: Path, workload: Workload, runtime: Runtime, on_progress: OnProgress
) -> tuple[CaseReport, dict[str, Any]]:
    """Measure now, whatever was measured before: what the cases showed, and all numbers."""
    from twinloop.models.label_tokenizer import load_answering
    from twinloop.records.validated import read_records
    from twinloop.serving.answer_form import stated_form
    from twinloop.serving.engine import Engine
    from twinloop.tasks.load_test import run_load_test

    settings, tokenizer = workload.settings, load_answering(exported)
    cases = read_records(workload.data, "cases")[:SERVED_PROMPTS]
    prompts = [tokenizer.encode_prompt(case["prompt"]) for case in cases]
    load = run_load_test(
        exported,
        prompts,
        max_tokens=settings.max_new_tokens,
        form=stated_form(workload.domain),
        slots=settings.slots,
        threads=runtime.threads,
    )
    engine = Engine.load(exported, slots=settings.slots, threads=runtime.threads)
    report, metrics = measure_engine(engine, tokenizer, workload, on_progress)
    return report, metrics | load.model_dump()
