"""An exported model (ONNX): the directory that the engine serves, and nothing beside it.

model.onnx, model.onnx.data   graph and weights
config.json, tokenizer files  as in the model directory it was made from, with max_length as the tokenizer's limit
bundle.json                   precision, max_length, size, and digests of the model's files
adapter/                      where the graph takes adapters: its own, in PEFT's form; the weights are the base's
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import onnx
from pydantic import BaseModel, ConfigDict, ValidationError

from twinloop.common.errors import UserError
from twinloop.common.files import file_digest
from twinloop.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, read_adapter, refuse_another_base
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.directory import (
    ADAPTER,
    BASE,
    CONFIG,
    GENERATION_CONFIG,
    check_tensors,
    is_adapted,
    load_config,
    load_tensors,
)
from twinloop.models.onnx_graph import PRECISIONS, WITH_ROW_ADAPTERS, build_graph, slot_capacity
from twinloop.models.shapes import weight_shapes
from twinloop.models.tokenizer_files import SETTINGS, limited
from twinloop.models.vocabulary import TOKENIZER

EXPORT_FILE = "bundle.json"
GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
_COPIED = (CONFIG, TOKENIZER, GENERATION_CONFIG)
_ADAPTER_FILES = (f"{ADAPTER}/{ADAPTER_CONFIG}", f"{ADAPTER}/{ADAPTER_WEIGHTS}")
_FORMAT = 1


class ExportedModel(BaseModel):
    """What `bundle.json` holds. max_length: tokens of prompt and answer together that a slot holds at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    precision: Precision
    max_length: int
    parameters: int
    files: dict[str, str]
    """File name to SHA-256."""

    @property
    def takes_adapters(self) -> bool:
        """Whether its graph takes adapters. Then it has one of its own, and its weights are that one's base."""
        return _ADAPTER_FILES[0] in self.files

    def has_base_of(self, other: ExportedModel) -> bool:
        """Whether adapters of the other one can be served beside these weights, with the very answers they give there:
        graph and weights are the same bytes."""
        same = all(self.files[name] == other.files[name] for name in (GRAPH_FILE, WEIGHTS_FILE))
        return same and self.takes_adapters and other.takes_adapters


def export_model(
    model_dir: Path | str, out_dir: Path | str, *, precision: Precision, max_length: int, adapters: bool = False
) -> ExportedModel:
    """Export a model directory. `out_dir` appears whole or not at all, and must not exist yet.

    adapters: keep the adapter of an adapted model beside its base, and let others be applied when it is served; else
    its weights are the merged ones.

    Raises UserError for an unknown precision, a length out of range, an `out_dir` that is there already, a model
    directory that lacks a tensor, and `adapters` of a model that has none, or in a precision that runs on CUDA only.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if precision not in PRECISIONS:
        raise UserError(f"export: precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if adapters and precision not in WITH_ROW_ADAPTERS:
        raise UserError(f"export: with adapters it is one of {', '.join(WITH_ROW_ADAPTERS)}, not {precision}")
    if adapters and not is_adapted(model_dir):
        raise UserError(f"export: {model_dir} has no adapter; export it without adapters")
    config = load_config(model_dir)
    if not 2 <= max_length <= config.max_position_embeddings:
        raise UserError(
            f"export: max_length {max_length} is outside 2..{config.max_position_embeddings}, "
            f"the positions that the model in {model_dir} was made for"
        )
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"export: {out_dir} is not empty; remove it or choose another directory")
    tensors = load_tensors(model_dir / BASE if adapters else model_dir)
    shapes = {name: array.shape for name, array in tensors.items()}
    check_tensors(weight_shapes(config), shapes, tied=config.tie_word_embeddings, where=str(model_dir))
    if adapters:
        refuse_another_base(model_dir / ADAPTER, tensors, config)
        read_adapter(model_dir / ADAPTER, config)  # what cannot be served is refused before it is written
    capacity = slot_capacity(max_length)
    model = build_graph(config, tensors, precision=precision, capacity=capacity, row_adapters=adapters)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as beside:
        staging = Path(beside) / "exported"
        staging.mkdir()
        onnx.save_model(
            model,
            staging / GRAPH_FILE,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=WEIGHTS_FILE,
            size_threshold=1024,
        )
        for name in _COPIED:
            if (model_dir / name).exists():
                shutil.copyfile(model_dir / name, staging / name)
        if adapters:
            (staging / ADAPTER).mkdir()
        for name in _ADAPTER_FILES if adapters else ():
            shutil.copyfile(model_dir / name, staging / name)
        if (model_dir / SETTINGS).exists():
            limit_tokenizer(model_dir / SETTINGS, staging / SETTINGS, max_length)
        hashed = (GRAPH_FILE, WEIGHTS_FILE, *(_ADAPTER_FILES if adapters else ()))
        exported = ExportedModel(
            format=_FORMAT,
            precision=precision,
            max_length=max_length,
            parameters=config.num_parameters,
            files={name: file_digest(staging / name) for name in hashed},
        )
        (staging / EXPORT_FILE).write_text(exported.model_dump_json(indent=2) + "\n")
        os.replace(staging, out_dir)
    return exported


def limit_tokenizer(source: Path, target: Path, max_length: int) -> None:
    """Copy a tokenizer_config.json, its `model_max_length` what is served."""
    settings = limited(json.loads(source.read_text(encoding="utf-8")), max_length)
    target.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_exported(exported_dir: Path | str) -> tuple[ExportedModel, DecoderConfig]:
    """Read and verify an exported model, every byte of its graph and weights.

    Raises UserError where there is none, or one that is corrupt.
    """
    exported_dir = Path(exported_dir)
    exported = describe_exported(exported_dir)
    for name, digest in exported.files.items():
        file = exported_dir / name
        if not file.is_file() or file_digest(file) != digest:
            state = "differs from its digest in" if file.is_file() else "is missing, but is listed in"
            raise UserError(f"{file} {state} {EXPORT_FILE}: the exported model is corrupt; export it again")
    return exported, load_config(exported_dir)


def describe_exported(exported_dir: Path) -> ExportedModel:
    """What an exported model says of itself; its files are not looked at. Raises UserError where it says nothing."""
    path = exported_dir / EXPORT_FILE
    if not path.is_file():
        raise UserError(f"{exported_dir} holds no exported model ({EXPORT_FILE} is missing); export one to it")
    try:
        exported = ExportedModel.model_validate_json(path.read_bytes())
    except ValidationError as error:
        what = error.errors()[0]
        where = ".".join(map(str, what["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {what['msg']}; export the model again") from None
    if exported.format != _FORMAT:
        raise UserError(f"{path}: format {exported.format} is not {_FORMAT}; export the model again")
    return exported


def read_own_adapter(exported_dir: Path, config: DecoderConfig) -> Adapter:
    """The adapter of an exported model that takes adapters. Raises UserError as `read_adapter` does."""
    return read_adapter(exported_dir / ADAPTER, config)
