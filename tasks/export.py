"""Export: a checkpoint becomes an exported model (ONNX), and is compared with the network that it came from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task

from twinloop.models.config import Precision
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.training.runtime import Runtime

COMPARED_CASES = 16
COMPARED_TOKENS = 96


def export_stage(
    context: Context, precision: Precision, max_length: int, runtime: Runtime, *, data: Artifact, model: Artifact
) -> Artifact:
    """An exported model; its parity with the network is in the metrics."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        import torch

        from twinloop.models.exported import export_model
        from twinloop.models.tokenizer import ChatTokenizer
        from twinloop.records.validated import read_records
        from twinloop.serving.engine.sampling import SamplingParams
        from twinloop.tasks.parity import parity

        torch.set_num_threads(runtime.threads)
        exported = export_model(model.path, out, precision=precision, max_length=max_length)
        tokenizer = ChatTokenizer.load(model.path)
        cases = read_records(data.path, "cases")[:COMPARED_CASES]
        found = parity(
            model.path,
            out,
            [tokenizer.encode_prompt(case["prompt"]) for case in cases],
            SamplingParams(max_tokens=COMPARED_TOKENS, stop=tokenizer.stop_ids),
            threads=runtime.threads,
        )
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return {"precision": precision, "parameters": exported.parameters, "bytes": size, **asdict(found)}

    return context.run(
        "export",
        work,
        settings={"precision": precision, "max_length": max_length, "runtime": runtime.model_dump()},
        inputs={"data": data, "model": model},
        modules=("twinloop.tasks.export",),
        label=f"export {precision}",
    )


export = task(name="export", persist_result=False)(export_stage)
