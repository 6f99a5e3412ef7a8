"""A project of registered versions to give out, and what gives them out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import torch
from known_tokenizer import known_tokenizer, make_model

from twinloop.models.adapter import read_adapter
from twinloop.models.directory import load_config, save_adapted
from twinloop.models.exported import export_model
from twinloop.registry.artifact import MANIFEST, ArtifactStore
from twinloop.registry.snapshot import VersionName
from twinloop.registry.tracking import CodeVersion
from twinloop.registry.versions import Lineage, Registry
from twinloop.tasks.conversion import convert_version


def register(
    project: Path,
    registry: Registry,
    make: Callable[[Path], object],
    cases: Sequence[list[dict[str, str]]] = (),
    max_length: int = 200,
) -> None:
    """A checkpoint and its exported model, as two stages of a run make them. make: fills the checkpoint's folder.
    cases: prompts of the data that it was trained with."""

    def train(out: Path, work: Path) -> dict[str, Any]:
        make(out)
        return {}

    store = ArtifactStore(project / "artifacts")
    number = f"{registry.name} {len(registry.snapshot().versions)}"

    def validate(out: Path, work: Path) -> dict[str, Any]:
        pl.DataFrame({"prompt": list(cases)}).write_parquet(out / "cases.parquet")
        return {}

    data = store.run("validate", settings={"number": number}, inputs={}, code="c", build=validate) if cases else None
    inputs = {"data": data} if data else {}
    checkpoint = store.run("sft", settings={"number": number}, inputs=inputs, code="c", build=train)

    def export(out: Path, work: Path) -> dict[str, Any]:
        export_model(checkpoint.path, out, precision="fp32", max_length=max_length)
        return {}

    exported = store.run("export", settings={}, inputs={"model": checkpoint}, code="c", build=export)
    lineage = Lineage("/home/ada/recipes/small.yaml", "chat", None, CodeVersion("c0ffee"))
    made = registry.checkpoints.register(checkpoint.path, lineage)

    registry.register(exported.path, replace(lineage, parent=VersionName(made.name, made.version)), servable=True)


def greedy_tokens(notes: Sequence[str]) -> int:
    return int(notes[0].split()[0])


def make_adapted(out: Path) -> None:
    """A checkpoint of a stage with `lora`, its adapter trained in `peft`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        whole, adapter = Path(folder) / "whole", Path(folder) / "adapter"
        make_model(whole, known_tokenizer())
        base = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        adapted.save_pretrained(adapter)
        save_adapted(out, whole, read_adapter(adapter, load_config(whole)), skip=MANIFEST)


def convert(project: SimpleNamespace, name: str, form: str, out: Path, **options: str) -> Any:
    return convert_version(project.folder, project.registry, name, form, out, **options)
