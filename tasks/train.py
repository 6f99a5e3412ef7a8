"""A stage of training: a model directory and records in, a model directory out. The recipe names the method."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from prefect import task

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import TrainStage
from twinloop.training.runtime import Runtime

log = logging.getLogger(__name__)

NOTHING_LEARNED = {
    True: "nothing was learned: all answers to each prompt got the same reward. The stages before must first give some "
    "right answers; train them longer",
    False: "nothing was learned: no record has a token to train on; look at what validation quarantined",
}
"""By whether the method trains on rewards."""


@task(name="train", task_run_name="{stage.name}", persist_result=False)
def train(
    context: Context, stage: TrainStage, runtime: Runtime, *, data: Artifact, model: Artifact, audit: Artifact | None
) -> Artifact:
    """A model directory; steps, tokens, losses and seconds in `metrics`.

    audit: of the verifier, which a method that trains on its rewards needs; without one nothing is trained.
    """
    method, settings = stage.method, stage.settings
    assert audit or not method.needs_verifier, f"{stage.name} was started without an audit of its verifier"

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.directory import save_model
        from twinloop.models.tokenizer import ChatTokenizer
        from twinloop.records.validated import read_records
        from twinloop.training.loop import run_training
        from twinloop.training.weights import get_weights, load_decoder

        runtime.use()
        network, tokenizer = load_decoder(model.path), ChatTokenizer.load(model.path)
        records = read_records(data.path, method.records)
        objective, batches = method.build(records, network, tokenizer, settings, runtime, context.domain)
        result = run_training(
            network,
            objective,
            batches,
            settings,
            checkpoint_dir=keep / "checkpoints",
            checkpoint_every_s=context.checkpoint_every_s,
            on_step=report.trained(method.shown),
            device=runtime.device,
        )
        save_model(out, network.config, get_weights(network), tokenizer)
        if not result.tokens:
            log.warning("%s: %s", stage.name, NOTHING_LEARNED[method.needs_verifier])
        return result.summary() | {"records": len(records)}

    return context.run(
        stage.name,
        work,
        settings={**settings.model_dump(), "runtime": runtime.model_dump()},
        inputs={"data": data, "model": model} | ({"audit": audit} if audit and method.needs_verifier else {}),
        modules=("twinloop.tasks.train",),
        found=[method.found],
        uses_domain=method.uses_domain,
    )
