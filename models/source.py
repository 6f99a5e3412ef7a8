"""A model that somebody else made, as a base to train on: a Hugging Face directory or a GGUF file.

`open_source` reads headers only, and refuses what could not be trained, exported and served: seconds, not gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from twinloop.common.errors import UserError
from twinloop.common.files import file_digest
from twinloop.models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, refuse_another_base
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import (
    ADAPTER,
    BASE,
    CONFIG,
    GENERATION_CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_tensors,
    is_adapted,
    load_config,
    load_tensors,
    weight_files,
)
from twinloop.models.gguf_file import MAGIC, GGUFFile
from twinloop.models.gguf_model import load_network, network_shapes, read_network
from twinloop.models.gguf_tokenizer import read_stop_ids, read_tokenizer
from twinloop.models.shapes import weight_shapes
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.models.tokenizer_files import settings_files
from twinloop.models.vocabulary import TOKENIZER

STORED_TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""Of tensors in safetensors that are kept as they are, and what people call them."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""What transformers wrote beside the weights before 2023, and computes today."""
LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)


class Source(Protocol):
    """config: the network, its special tokens those of the tokenizer. form: of the weights, such as bf16 or Q4_1.
    license: as the source states it. adapter: the directory of one that becomes a part of the weights."""

    path: Path
    adapter: Path | None
    config: DecoderConfig
    form: str
    license: str | None

    def load_weights(self) -> dict[str, np.ndarray]:
        """By Hugging Face's names, without a second copy of a tied matrix."""

    def load_tokenizer(self) -> ChatTokenizer: ...

    def digest(self) -> str:
        """sha256 over the names and bytes of the files that the model is read from."""


def open_source(path: Path, adapter: Path | None = None) -> Source:
    """The model in a directory or a GGUF file, its header checked. Raises UserError for one that cannot be a base.

    adapter: a directory in PEFT's form, of this model.
    """
    if adapter is not None:
        return AdaptedSource(open_source(path), adapter)
    if is_adapted(path):
        return AdaptedSource(HuggingFaceSource(path / BASE), path / ADAPTER)
    if path.is_dir():
        return HuggingFaceSource(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such directory or file; a base is a Hugging Face directory or a GGUF file on this disk"
        )
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if start != MAGIC and path.suffix == ".safetensors":
        raise UserError(f"{path}: weights alone are no model; name the directory that holds them with {CONFIG}")
    return GGUFSource(path)


class HuggingFaceSource:
    """config.json, safetensors (one file, or shards and their index) and the tokenizer's files."""

    adapter: Path | None = None

    def __init__(self, path: Path):
        self.path = path
        _refuse_directory(path)
        config = load_config(path)
        files = [path / name for name in weight_files(path)]
        shapes: dict[str, tuple[int, ...]] = {}
        types: set[str] = set()
        for file in files:
            for name, (dtype, shape) in read_safetensors_header(file).items():
                if not BUFFERS.fullmatch(name):
                    shapes[name] = shape
                    types.add(dtype)
        if unknown := types - STORED_TYPES.keys():
            raise UserError(f"{path}: weights of type {min(unknown)} are not read; convert them to bf16")
        check_tensors(weight_shapes(config), shapes, tied=config.tie_word_embeddings, where=str(path))
        self.config = config  # the tokenizer is read for its number of rows
        self.config = _with_tokens(config, self.load_tokenizer(), path)
        names = (CONFIG, GENERATION_CONFIG, TOKENIZER, WEIGHTS_INDEX)
        self._files = [*(path / name for name in names), *settings_files(path), *files]
        self.form = " and ".join(STORED_TYPES[each] for each in sorted(types))
        self.license = _stated_license(path)

    def load_weights(self) -> dict[str, np.ndarray]:
        wanted = weight_shapes(self.config)
        return {name: tensor for name, tensor in load_tensors(self.path).items() if name in wanted}

    def load_tokenizer(self) -> ChatTokenizer:
        try:
            return ChatTokenizer.load(self.path, rows=self.config.vocab_size)
        except UserError as error:
            raise _in_directory(self.path, error) from None

    def digest(self) -> str:
        return _digest(self.path, [file for file in self._files if file.exists()])


class GGUFSource:
    """One GGUF file, tokenizer and chat template included. Its weights are float32 once they are read."""

    adapter: Path | None = None

    def __init__(self, path: Path):
        self.path = path
        self._file = GGUFFile(path)
        config = read_network(self._file)
        shapes = network_shapes(self._file, config)
        check_tensors(weight_shapes(config), shapes, tied=False, where=str(path))
        self.config = _with_tokens(config, self.load_tokenizer(), path)
        matrices = [tensor for tensor in self._file.tensors.values() if len(tensor.shape) == 2]
        sizes: dict[str, int] = {}
        for tensor in matrices:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size
        self.form = max(sizes, key=lambda each: sizes[each])
        stated = self._file.metadata.get("general.license")
        self.license = stated if isinstance(stated, str) else None

    def load_weights(self) -> dict[str, np.ndarray]:
        return load_network(self._file, self.config)

    def load_tokenizer(self) -> ChatTokenizer:
        tokenizer, settings = read_tokenizer(self._file.metadata, str(self.path))
        try:
            return ChatTokenizer(tokenizer, settings, stop_ids=read_stop_ids(self._file.metadata))
        except UserError as error:
            raise UserError(f"{self.path}: its tokenizer, {error}") from None

    def digest(self) -> str:
        return _digest(self.path.parent, [self.path])


class AdaptedSource:
    """A model and an adapter of it, merged once they are read."""

    def __init__(self, base: Source, adapter: Path):
        """Raises UserError for an adapter of another base, see `read_adapter`."""
        self._base = base
        self.path, self.config, self.license = base.path, base.config, base.license
        self.adapter: Path | None = adapter
        self.form = f"{base.form} with an adapter of rank {max(read_adapter(adapter, base.config).ranks.values())}"

    def load_weights(self) -> dict[str, np.ndarray]:
        """Raises UserError for an adapter that was trained on other weights, where that can be known."""
        assert self.adapter is not None
        adapter, weights = read_adapter(self.adapter, self.config), self._base.load_weights()
        if self.path.is_dir():  # those of a GGUF file may be rounded
            refuse_another_base(self.adapter, weights, self.config)
        return adapter.merge(weights)

    def load_tokenizer(self) -> ChatTokenizer:
        return self._base.load_tokenizer()

    def digest(self) -> str:
        assert self.adapter is not None
        own = _digest(self.adapter, [self.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)])
        return hashlib.sha256(f"{self._base.digest()} {own}".encode()).hexdigest()


def read_safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each tensor. Raises UserError for a file that is cut off or not one."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _tensor_entry(entry) for name, entry in header.items()}
    except OSError as error:
        raise UserError(f"{path}: no weights to read here ({error.strerror})") from None
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file, or cut off ({error}); fetch it again") from None
    end = max((end for *_, end in entries.values()), default=0)
    if 8 + length + end > size:
        raise UserError(f"{path}: cut off: {8 + length + end - size:,} bytes are missing; fetch it again")
    return {name: (dtype, shape) for name, (dtype, shape, _) in entries.items()}


def _tensor_entry(entry: Any) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and where the bytes end. Raises ValueError, or what indexing raises, for what is no entry."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in (*shape, start, end - start)):
        raise ValueError(f"{dtype!r}, {shape!r} and bytes {start!r} to {end!r} describe no tensor")
    return dtype, tuple(shape), end


def _refuse_directory(path: Path) -> None:
    """Raise UserError for a directory that has other than a whole model's weights, and say what it has."""
    if (path / ADAPTER_CONFIG).exists() and not (path / CONFIG).exists():
        base = _adapters_base(path / ADAPTER_CONFIG)
        raise UserError(
            f"{path}: an adapter, not a model; name its base{base} here, and beside it `adapter: {path.name}`"
        )
    if not list(path.glob("*.safetensors")):
        if pickled := sorted(file.name for pattern in PICKLED for file in path.glob(pattern)):
            raise UserError(
                f"{path}: {pickled[0]} is pickled, which can run any code when it is read; convert it to {WEIGHTS}"
            )
        if files := sorted(path.glob("*.gguf")):
            raise UserError(f"{path}: a directory of GGUF files; name one, such as {files[0].name}")


def _adapters_base(path: Path) -> str:
    """As its settings name it, in brackets; nothing where they do not."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f" ({named})" if isinstance(named, str) else ""


def _with_tokens(config: DecoderConfig, tokenizer: ChatTokenizer, path: Path) -> DecoderConfig:
    """The special tokens of a checkpoint are those that its chats are written with."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the embedding has "
            f"{config.vocab_size} rows: they are not of the same model"
        )
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.stop_id, "pad_token_id": tokenizer.pad_id}
    return config.model_copy(update=ids)


def _in_directory(path: Path, error: UserError) -> UserError:
    text = str(error)
    return UserError(text if text.startswith(str(path)) else f"{path}: {text}")


def _stated_license(path: Path) -> str | None:
    """Of the front matter of its README.md."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = LICENSE.search(front)
    return found[1] if found else None


def _digest(folder: Path, files: list[Path]) -> str:
    content = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(folder).as_posix()
        content.update(f"{name} {file_digest(path)}\n".encode())
    return content.hexdigest()
