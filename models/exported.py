"""An exported model (ONNX): the directory that the engine serves, and nothing beside it.

model.onnx, model.onnx.data   graph and weights
config.json, tokenizer files  as in the model directory it was made from, with max_length as the tokenizer's limit
bundle.json                   precision, max_length, size and digest of the two model files
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
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.directory import CONFIG, GENERATION_CONFIG, check_tensors, load_config, load_tensors
from twinloop.models.onnx_graph import PRECISIONS, build_graph, slot_capacity
from twinloop.models.shapes import weight_shapes
from twinloop.models.tokenizer_files import SETTINGS
from twinloop.models.vocabulary import TOKENIZER

EXPORT_FILE = "bundle.json"
GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
_COPIED = (CONFIG, TOKENIZER, GENERATION_CONFIG)
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


def export_model(model_dir: Path | str, out_dir: Path | str, *, precision: Precision, max_length: int) -> ExportedModel:
    """Export a model directory. `out_dir` appears whole or not at all, and must not exist yet.

    Raises UserError for an unknown precision, a length out of range, an `out_dir` that is there already, or a model
    directory that lacks a tensor.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if precision not in PRECISIONS:
        raise UserError(f"export: precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    config = load_config(model_dir)
    if not 2 <= max_length <= config.max_position_embeddings:
        raise UserError(
            f"export: max_length {max_length} is outside 2..{config.max_position_embeddings}, "
            f"the positions that the model in {model_dir} was made for"
        )
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"export: {out_dir} is not empty; remove it or choose another directory")
    tensors = load_tensors(model_dir)
    shapes = {name: array.shape for name, array in tensors.items()}
    check_tensors(weight_shapes(config), shapes, tied=config.tie_word_embeddings, where=str(model_dir))
    model = build_graph(config, tensors, precision=precision, capacity=slot_capacity(max_length))
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
        if (model_dir / SETTINGS).exists():
            limit_tokenizer(model_dir / SETTINGS, staging / SETTINGS, max_length)
        exported = ExportedModel(
            format=_FORMAT,
            precision=precision,
            max_length=max_length,
            parameters=config.num_parameters,
            files={name: file_digest(staging / name) for name in (GRAPH_FILE, WEIGHTS_FILE)},
        )
        (staging / EXPORT_FILE).write_text(exported.model_dump_json(indent=2) + "\n")
        os.replace(staging, out_dir)
    return exported


def limit_tokenizer(source: Path, target: Path, max_length: int) -> None:
    """Copy a tokenizer_config.json whose `model_max_length`, which clients cut their texts at, is what is served."""
    settings = json.loads(source.read_text(encoding="utf-8"))
    stated = settings.get("model_max_length")
    smaller = isinstance(stated, (int, float)) and 0 < stated < max_length
    settings["model_max_length"] = stated if smaller else max_length
    target.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_exported(exported_dir: Path | str) -> tuple[ExportedModel, DecoderConfig]:
    """Read and verify an exported model, every byte of its graph and weights.

    Raises UserError where there is none, or one that is corrupt.
    """
    exported_dir = Path(exported_dir)
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
    for name, digest in exported.files.items():
        file = exported_dir / name
        if not file.is_file() or file_digest(file) != digest:
            state = "differs from its digest in" if file.is_file() else "is missing, but is listed in"
            raise UserError(f"{file} {state} {EXPORT_FILE}: the exported model is corrupt; export it again")
    return exported, load_config(exported_dir)
