"""Preference tuning (DPO): chosen over rejected, against the network that it starts from, frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import PreferenceSettings
from twinloop.tasks.runtime import Runtime


@task(name="dpo", cache_policy=NO_CACHE)
def dpo(
    context: Context, settings: PreferenceSettings, runtime: Runtime, *, data: Artifact, model: Artifact
) -> Artifact:
    """A model directory."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.records.validated import read_records
        from twinloop.tasks.learn import learn, open_model
        from twinloop.tasks.lessons.dpo import lesson

        network, tokenizer = open_model(model.path, runtime)
        records = read_records(data.path, "preferences")
        objective, batches = lesson(records, network, tokenizer, settings, runtime)
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
        return metrics | {"pairs": len(records), "fill": batches.packing.fill}

    return context.run(
        "dpo",
        work,
        settings={**settings.model_dump(), "runtime": runtime.model_dump()},
        inputs={"data": data, "model": model},
        modules=("twinloop.tasks.dpo",),
    )
