"""Supervised fine-tuning: only the answer is learned, its stop token included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import FinetuneSettings
from twinloop.tasks.runtime import Runtime


@task(name="sft", cache_policy=NO_CACHE)
def sft(context: Context, settings: FinetuneSettings, runtime: Runtime, *, data: Artifact, model: Artifact) -> Artifact:
    """A model directory."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.records.validated import read_records
        from twinloop.tasks.learn import learn, open_model
        from twinloop.tasks.lessons.sft import lesson

        network, tokenizer = open_model(model.path, runtime)
        records = read_records(data.path, "chat")
        objective, batches = lesson(records, tokenizer, settings, runtime)
        metrics = learn(
            network,
            tokenizer,
            objective,
            batches,
            settings,
            runtime,
            out=out,
            keep=keep,
            report=report,
            checkpoint_every_s=context.checkpoint_every_s,
        )
        return metrics | {"examples": len(records), "fill": batches.packing.fill}

    return context.run(
        "sft",
        work,
        settings={**settings.model_dump(), "runtime": runtime.model_dump()},
        inputs={"data": data, "model": model},
        modules=("twinloop.tasks.sft",),
    )
