"""Export: a checkpoint becomes an exported model (ONNX). What it computes is compared by the stage `parity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from twinloop.models.config import Precision
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report


def export_stage(
    context: Context, precision: Precision, max_length: int, *, model: Artifact, adapters: bool = False
) -> Artifact:
    """An exported model in this precision, for prompts and answers of up to `max_length` tokens together.

    adapters: with the model's adapter beside its base, see `export_model`.
    """

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.exported import export_model

        exported = export_model(model.path, out, precision=precision, max_length=max_length, adapters=adapters)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return {"precision": precision, "parameters": exported.parameters, "bytes": size}

    return context.run(
        "export",
        work,
        settings={"precision": precision, "max_length": max_length, **({"adapters": True} if adapters else {})},
        inputs={"model": model},
        modules=("twinloop.tasks.export",),
        label=f"export {precision}",
    )


export = task(name="export", persist_result=False)(export_stage)
