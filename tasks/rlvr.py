"""Verifier RL (GRPO): the network samples on the engine that ships, the verifier pays, better than the group is up."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import ReinforceSettings
from twinloop.tasks.runtime import Runtime

log = logging.getLogger(__name__)


@task(name="rlvr", cache_policy=NO_CACHE)
def rlvr(
    context: Context,
    settings: ReinforceSettings,
    runtime: Runtime,
    *,
    data: Artifact,
    model: Artifact,
    audit: Artifact,
) -> Artifact:
    """A model directory. `audit` is the proof that the verifier may pay rewards; without one nothing is trained."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.records.validated import read_records
        from twinloop.tasks.learn import learn, open_model
        from twinloop.tasks.lessons.rlvr import lesson

        network, tokenizer = open_model(model.path, runtime)
        records = read_records(data.path, "prompts")
        objective, rollouts = lesson(records, network, tokenizer, settings, runtime)
        metrics = learn(
            network,
            tokenizer,
            objective,
            rollouts,
            settings,
            runtime,
            out=out,
            keep=keep,
            report=report,
            checkpoint_every_s=context.checkpoint_every_s,
        )
        if not metrics["tokens"]:
            log.warning("rlvr: the answers of every group got the same reward, so nothing was learned")
        return metrics | {"prompts": len(records)}

    return context.run(
        "rlvr",
        work,
        settings={**settings.model_dump(), "runtime": runtime.model_dump()},
        inputs={"data": data, "model": model, "audit": audit},
        modules=("twinloop.tasks.rlvr",),
    )
