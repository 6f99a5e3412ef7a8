"""The base where a recipe names a model that is there already: a model directory made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from prefect import task

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Artifact
from twinloop.tasks.base_source import Base
from twinloop.tasks.context import Context, Report


def import_stage(context: Context, base: Base) -> Artifact:
    """A model directory with the source's weights, in its own float type or float32, its tokenizer and chat template.
    An adapter is merged.

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
                raise UserError(f"base: {source.path}: {name} holds values that are not finite; fetch it again")
        save_model(out, base.config, weights, read.load_tokenizer())
        return {"parameters": base.config.num_parameters}

    return context.run(
        "base",
        work,
        settings={"network": base.config.model_dump(exclude_defaults=True)},
        inputs={"source": base.digest(context.project)},
        modules=("twinloop.tasks.imported_base",),
    )


import_base = task(name="base", persist_result=False)(import_stage)
