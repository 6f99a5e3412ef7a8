"""Evaluation of an exported bundle, in the engine that will serve it: every case, held-out text, speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, OnProgress, Report
from twinloop.tasks.recipe import EvaluateSettings
from twinloop.tasks.runtime import Runtime

SERVED_PROMPTS = 64


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(
    context: Context,
    settings: EvaluateSettings,
    runtime: Runtime,
    *,
    data: Artifact,
    bundle: Path,
    digest: Artifact | str,
) -> Artifact:
    """cases.json and what the gate looks at. `digest` names the content of the directory `bundle`."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        return evaluate_bundle(settings, runtime, data=data, bundle=bundle, out=out, on_progress=report.moved)

    return context.run(
        "evaluate",
        work,
        settings={**settings.model_dump(exclude={"stage_cases"}), "threads": runtime.threads},
        inputs={"data": data, "bundle": digest},
        modules=("twinloop.tasks.evaluate",),
    )


def evaluate_bundle(
    settings: EvaluateSettings, runtime: Runtime, *, data: Artifact, bundle: Path, out: Path, on_progress: OnProgress
) -> dict[str, Any]:
    """Measure now, whatever was measured before."""
    from twinloop.models.tokenizer import ChatTokenizer
    from twinloop.records.validated import read_records
    from twinloop.serving.engine import Engine
    from twinloop.serving.engine.sampling import SamplingParams
    from twinloop.tasks.load_test import run_load_test
    from twinloop.tasks.measure import measure_engine

    tokenizer = ChatTokenizer.load(bundle)
    prompts = [tokenizer.encode_prompt(case["prompt"]) for case in read_records(data.path, "cases")[:SERVED_PROMPTS]]
    greedy = SamplingParams(max_tokens=settings.max_new_tokens, stop=(tokenizer.stop_id,))
    load = run_load_test(bundle, prompts, greedy, slots=settings.slots, threads=runtime.threads)
    engine = Engine.load(bundle, slots=settings.slots, threads=runtime.threads)
    longest = settings.max_new_tokens
    metrics = measure_engine(engine, bundle, data.path, out, on_progress, limit=None, max_tokens=longest)
    return metrics | load.model_dump()
