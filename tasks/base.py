"""The base of a recipe with a new network: made from its seed. See `imported_base` for one that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from twinloop.registry.artifact import Artifact
from twinloop.tasks.base_settings import NewBase
from twinloop.tasks.context import Context, Report


def base_stage(context: Context, settings: NewBase, *, seed: int, tokenizer: Artifact) -> Artifact:
    """A model directory: an untrained network, and the tokenizer."""
    config = settings.decoder_config(tokenizer.metrics["vocab_size"])

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.directory import save_model
        from twinloop.models.tokenizer import ChatTokenizer
        from twinloop.training.weights import get_weights, new_decoder

        vocabulary = ChatTokenizer.load(tokenizer.path)
        assert (vocabulary.bos_id, vocabulary.stop_id) == (config.bos_token_id, config.eos_token_id)
        network = new_decoder(config, seed=seed, keys_as_queries=settings.keys_as_queries)
        save_model(out, config, get_weights(network), vocabulary)
        return {"parameters": config.num_parameters}

    return context.run(
        "base",
        work,
        settings={
            "network": config.model_dump(exclude_defaults=True),
            "keys_as_queries": settings.keys_as_queries,
            "seed": seed,
        },
        inputs={"tokenizer": tokenizer},
        modules=("twinloop.tasks.base",),
    )


new_base = task(name="base", persist_result=False)(base_stage)
