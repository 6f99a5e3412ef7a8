"""The model directory: what `transformers` calls a checkpoint, read and written without torch.

config.json, model.safetensors, generation_config.json, and the tokenizer's tokenizer.json and tokenizer_config.json.

An adapted model has no weights of its own, but two folders: `base/`, the model directory that was adapted, its files
hard-linked so that they take no space again, and `adapter/`, in PEFT's form. Its weights are the two merged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 once it is imported)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from twinloop.common.errors import UserError
from twinloop.common.files import link_or_copy
from twinloop.models.adapter import ADAPTER_CONFIG, Adapter, base_digest, read_adapter, save_adapter
from twinloop.models.config import DecoderConfig
from twinloop.models.family import read_config, write_config
from twinloop.models.shapes import weight_shapes

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
BASE, ADAPTER = "base", "adapter"


class SavesItself(Protocol):
    @property
    def stop_ids(self) -> Sequence[int]: ...

    def save(self, directory: Path, /, *, max_length: int, pad_id: int | None = None) -> object: ...


def save_model(
    directory: Path, config: DecoderConfig, tensors: Mapping[str, np.ndarray], tokenizer: SavesItself | None = None
) -> None:
    """Write a model directory. tensors: by Hugging Face's names, `lm_head.weight` absent where it is tied.

    What ends an answer is what the tokenizer says, where there is one: it may be more tokens than the config has.
    The directory is made if need be. Whoever needs it whole or not at all writes beside and renames.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / CONFIG, write_config(config))
    stop_ids = [config.eos_token_id] if tokenizer is None else list(tokenizer.stop_ids)
    stop = {"bos_token_id": config.bos_token_id, "eos_token_id": stop_ids if stop_ids[1:] else stop_ids[0]}
    _write_json(directory / GENERATION_CONFIG, {"do_sample": False, "pad_token_id": config.pad_token_id, **stop})
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})  # transformers asks for the format
    if tokenizer is not None:
        # transformers takes the last token that is not padding for a text's last, so both must pad with the same one.
        pad_id = config.pad_token_id if config.labels else None
        tokenizer.save(directory, max_length=config.max_position_embeddings, pad_id=pad_id)


def save_adapted(directory: Path, source: Path, adapter: Adapter, *, skip: str) -> None:
    """Write an adapted model. source: the model directory that the adapter was trained on top of, itself adapted or
    not: adapters on each other become one on the same base. skip: the name of a file of `source` that is not its own.
    """
    base = source
    if is_adapted(source):
        base = source / BASE
        adapter = read_adapter(source / ADAPTER, load_config(source)).then(adapter)
    (directory / BASE).mkdir(parents=True)
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name != skip:
            link_or_copy(path, directory / BASE / path.name)
            if not path.name.startswith(WEIGHTS.partition(".")[0]):
                shutil.copyfile(path, directory / path.name)
    digest = base_digest(load_tensors(base), load_config(base))
    save_adapter(directory / ADAPTER, adapter, base=f"../{BASE}", digest=digest)


def is_adapted(directory: Path) -> bool:
    return (directory / ADAPTER / ADAPTER_CONFIG).is_file() and (directory / BASE).is_dir()


def load_config(directory: Path) -> DecoderConfig:
    """The network's shape. Raises UserError where config.json is missing, broken, or of another architecture."""
    fields = _read_json(directory / CONFIG)
    try:
        return read_config(fields)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None


def load_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All weights by name, in the type they are stored in; of one file, or of the shards that an index names. Those of
    an adapted model are merged, in float32.

    Raises UserError where a file is missing or corrupt.
    """
    if is_adapted(directory):
        config, weights = load_config(directory), load_tensors(directory / BASE)
        shapes = {name: array.shape for name, array in weights.items()}
        where = str(directory / BASE)
        check_tensors(weight_shapes(config), shapes, tied=config.tie_word_embeddings, where=where)
        return read_adapter(directory / ADAPTER, config).merge(weights)
    tensors: dict[str, np.ndarray] = {}
    for name in weight_files(directory):
        try:
            tensors |= load_file(_existing(directory / name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{directory / name}: corrupt weights ({error}); fetch or train them again") from None
        except (AttributeError, KeyError) as error:  # what safetensors 0.8 raises for a type that numpy has not
            raise UserError(f"{directory / name}: a type of weights cannot be read ({error}); convert them") from None
    return tensors


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], *, tied: bool, where: str
) -> None:
    """Compare shapes by name; `tied`: a second copy of the tied matrix is welcome. Raises UserError where they differ.

    wanted: what config.json asks for. given: what the weights are.
    """
    for name in sorted(wanted.keys() | given.keys()):
        if tied and name == "lm_head.weight":  # some exporters write the tied matrix twice
            continue
        if wanted.get(name) != given.get(name):
            raise UserError(
                f"{where}: {name} has shape {given.get(name, 'none')}, config.json wants {wanted.get(name, 'none')}"
            )


def check_float16(name: str, array: np.ndarray, where: str) -> None:
    """Raises UserError where a value would become infinite in float16."""
    if np.abs(array).max() > np.finfo(np.float16).max:
        raise UserError(f"{where}: {name} has values that float16 cannot hold; use --type bf16 or f32")


def weight_files(directory: Path) -> list[str]:
    """The safetensors files of a model directory: the single one before shards, as `transformers` takes them. Raises
    UserError where the index of shards is broken."""
    index = directory / WEIGHTS_INDEX
    if (directory / WEIGHTS).exists() or not index.exists():
        return [WEIGHTS]
    content = _read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    files = list(shards.values()) if isinstance(shards, dict) else []
    if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise UserError(f"{index}: weight_map does not map each tensor to a file; fetch the checkpoint again")
    return sorted(set(files))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_existing(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch the checkpoint again") from None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a model directory holds {CONFIG} and {WEIGHTS}")
    return path


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
