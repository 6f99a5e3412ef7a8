"""A stage of training: a model directory and records in, a model directory out. The recipe names the method.

With `lora` the network is frozen and an adapter trains. What comes out is then an adapted model: the base and one
adapter, into which those of earlier stages went too. Each stage starts with a fresh adapter on what the stages before
made, merged in memory, so that "adapter off" is always what the stage started from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect import task

from twinloop.registry.artifact import MANIFEST, Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import TrainStage
from twinloop.training.runtime import Runtime

log = logging.getLogger(__name__)

ADAPTER_BASE = "adapter_base"
"""In `metrics` of an adapted model: the digest of the artifact that its adapter is of."""
NOTHING_LEARNED = {
    True: "nothing was learned: all answers to each prompt got the same reward. The stages before must first give some "
    "right answers; train them longer",
    False: "nothing was learned: no record has a token to train on; look at what validation quarantined",
}
"""By whether the method trains on rewards."""


@task(name="train", task_run_name="{stage.name}", persist_result=False)
def train(
    context: Context,
    stage: TrainStage,
    runtime: Runtime,
    *,
    data: Artifact,
    model: Artifact,
    audit: Artifact | None,
    named: Mapping[str, Artifact] = MappingProxyType({}),
) -> Artifact:
    """A model directory; steps, tokens, losses and seconds in `metrics`.

    audit: of the verifier, which a stage that trains on its rewards needs; without one nothing is trained. named: the
    other models that the stage reads, by the setting that names each.
    """
    method, settings = stage.method, stage.settings
    assert audit or not stage.needs_verifier, f"{stage.name} was started without an audit of its verifier"

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.directory import save_adapted, save_model
        from twinloop.models.tokenizer import ChatTokenizer
        from twinloop.records.validated import read_records
        from twinloop.training.adapters import adapter_of, attach_adapter
        from twinloop.training.loop import run_training
        from twinloop.training.weights import get_weights, load_decoder

        runtime.use()
        network, tokenizer = load_decoder(model.path), ChatTokenizer.load(model.path)
        if settings.lora:
            attach_adapter(network, settings.lora.form, seed=runtime.seed, stage=stage.name)
        records = read_records(data.path, method.records)
        placed = settings.with_models({name: each.path for name, each in named.items()})
        objective, batches = method.build(records, network, tokenizer, placed, runtime, context.domain)
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
        adapter = adapter_of(network)
        made: dict[str, Any] = {}
        if adapter and settings.lora and not settings.lora.merge:
            save_adapted(out, model.path, adapter, skip=MANIFEST)
            made = {ADAPTER_BASE: model.metrics.get(ADAPTER_BASE, model.digest)}
        else:
            save_model(out, network.config, get_weights(network), tokenizer)
        if not result.tokens:
            log.warning("%s: %s", stage.name, NOTHING_LEARNED[method.needs_verifier])
        return result.summary() | {"records": len(records)} | made

    audited = {"audit": audit} if audit and stage.needs_verifier else {}
    return context.run(
        stage.name,
        work,
        settings={**settings.keyed(), "runtime": runtime.model_dump()} | stage.named_records,
        inputs={"data": data, "model": model, **audited, **{f"settings.{name}": each for name, each in named.items()}},
        modules=("twinloop.tasks.train",),
        found=[method.found],
        uses_domain=method.uses_domain,
    )
