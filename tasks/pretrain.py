"""Pretraining: the next token of packed documents, from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import ModelSettings, PretrainSettings
from twinloop.tasks.runtime import Runtime


@task(name="pretrain", cache_policy=NO_CACHE)
def pretrain(
    context: Context,
    settings: PretrainSettings,
    model_settings: ModelSettings,
    runtime: Runtime,
    *,
    data: Artifact,
    tokenizer: Artifact,
) -> Artifact:
    """A model directory."""
    config = model_settings.decoder_config(tokenizer.metrics["vocab_size"])

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        import torch

        from twinloop.models.tokenizer import ChatTokenizer
        from twinloop.records.validated import read_records
        from twinloop.tasks.learn import learn
        from twinloop.tasks.lessons.pretrain import lesson
        from twinloop.training.weights import new_decoder

        torch.set_num_threads(runtime.threads)
        vocabulary = ChatTokenizer.load(tokenizer.path)
        assert (vocabulary.bos_id, vocabulary.stop_id) == (config.bos_token_id, config.eos_token_id)
        texts = [record["text"] for record in read_records(data.path, "corpus")]
        objective, batches = lesson(texts, vocabulary, settings, runtime)
        metrics = learn(
            new_decoder(config, seed=runtime.seed),
            vocabulary,
            objective,
            batches,
            settings,
            runtime,
            out=out,
            keep=keep,
            report=report,
            checkpoint_every_s=context.checkpoint_every_s,
        )
        return metrics | {"parameters": config.num_parameters, "documents": len(texts), "fill": batches.packing.fill}

    return context.run(
        "pretrain",
        work,
        settings={**settings.model_dump(), "network": config.model_dump(), "runtime": runtime.model_dump()},
        inputs={"data": data, "tokenizer": tokenizer},
        modules=("twinloop.tasks.pretrain",),
    )
