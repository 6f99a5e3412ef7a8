"""The model directory: what `transformers` calls a checkpoint, read and written without torch.

config.json, model.safetensors, generation_config.json, and the tokenizer's tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models.config import DecoderConfig
from models.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"


class SavesItself(Protocol):
    def save(self, directory: Path, /) -> object: ...


def save_model(
    directory: Path, config: DecoderConfig, tensors: Mapping[str, np.ndarray], tokenizer: SavesItself | None = None
) -> None:
    """Write a model directory. tensors: by Hugging Face's names, `lm_head.weight` absent where it is tied.

    The directory is made if need be. Whoever needs it whole or not at all writes beside and renames.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / CONFIG, config.to_huggingface())
    stop = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(directory / GENERATION_CONFIG, {"do_sample": False, "pad_token_id": config.pad_token_id, **stop})
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})  # transformers asks for the format
    if tokenizer is not None:
        tokenizer.save(directory)


def load_config(directory: Path) -> DecoderConfig:
    """The network's shape. Raises UserError where config.json is missing, broken, or of another architecture."""
    try:
        fields = json.loads(_existing(directory / CONFIG).read_text(encoding="utf-8"))
        return DecoderConfig.from_huggingface(fields)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    except (ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{directory / CONFIG}: not a decoder's configuration ({reason})") from None


def load_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All weights by name, in the type they are stored in; of one file, or of the shards that an index names.

    Raises UserError where a file is missing or damaged.
    """
    index = directory / WEIGHTS_INDEX
    files = {WEIGHTS}
    if index.exists():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(files):
        try:
            tensors |= load_file(_existing(directory / name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{directory / name}: damaged weights ({error}); fetch or train them again") from None
    return tensors


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a model directory holds {CONFIG} and {WEIGHTS}")
    return path


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
