"""Models that a recipe names and that are there already, its base among them: model directories made from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from prefect import task

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Artifact
from twinloop.tasks.base_source import Base
from twinloop.tasks.context import Context, Report

if TYPE_CHECKING:
    from twinloop.models.tokenizer import ChatTokenizer


def import_stage(context: Context, base: Base, label: str | None = None) -> Artifact:
    """A model directory with the source's weights, in its own float type or float32, its tokenizer and chat template,
    pinned. An adapter is merged. label: what it is shown as, where it is not the base.

    Made again where a byte of the source has changed. Raises UserError where a registered version is not what it was,
    and for weights that are not finite.
    """
    source = base.source
    assert source is not None

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.directory import save_model
        from twinloop.models.source import open_source

        read = open_source(source.path, source.adapter)
        weights = read.load_weights()
        for name, array in weights.items():
            if not np.isfinite(array).all():
                raise UserError(
                    f"{label or 'base'}: {source.path}: {name} holds values that are not finite; fetch it again"
                )
        tokenizer = read.load_tokenizer()
        save_model(out, base.config, weights, tokenizer.pinned(base.pins) if base.pins else tokenizer)
        return {"parameters": base.config.num_parameters}

    return context.run(
        "base",
        work,
        settings={
            "network": base.config.model_dump(exclude_defaults=True),
            "pins": base.pins and base.pins.model_dump(mode="json"),
        },
        inputs={"source": base.digest(context.project)},
        modules=("twinloop.tasks.imported_base",),
        label=label,
    )


import_base = task(name="base", persist_result=False)(import_stage)


def import_models(
    context: Context, named: Mapping[str, Mapping[str, Base]], *, start: Artifact
) -> dict[str, dict[str, Artifact]]:
    """The other models that stages read and that are there already, as model directories, by stage and setting. start:
    the recipe's base.

    Raises UserError for one that writes text and has another tokenizer than the base's, whose tokens it is to read. A
    reward model reads text, by its own tokenizer.
    """
    from twinloop.models.tokenizer import ChatTokenizer

    made: dict[str, dict[str, Artifact]] = {}
    for stage, models in named.items():
        for name, model in models.items():
            directory = import_stage(context, model, label=f"{stage} {name}")
            own = ChatTokenizer.load(directory.path)
            if model.config.kind == "text" and _tokens(own) != _tokens(ChatTokenizer.load(start.path)):
                raise UserError(
                    f"{stage}: {name}: {model.title} has another tokenizer than the base, so it cannot read its "
                    "tokens; name a model with the same one, or start from a base that has its tokenizer"
                )
            made.setdefault(stage, {})[name] = directory
    return made


def _tokens(tokenizer: ChatTokenizer) -> tuple[object, ...]:
    """What each id means: alike in two models that read each other's tokens."""
    ends = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids)
    return list(tokenizer.token_bytes), tokenizer.special_ids, ends
