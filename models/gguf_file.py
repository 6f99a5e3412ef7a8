"""A GGUF file: its metadata and its table of tensors, and each tensor as float32.

The header is read here and not by the package `gguf`, which takes seconds for a vocabulary and has no error for a file
that was cut off; the block formats are the package's. The file is mapped: a tensor's bytes are read when it is asked
for.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from twinloop.common.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
READ_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Q5_K and the others of its kind are beside Q4_K in most files that are named by it."""
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
ROWS_AT_ONCE = 1024
"""Dequantised together: what the package needs besides the result grows with them."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the table. shape: as torch has it, the last dimension the one that lies together."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile:
    """metadata: by key, text, numbers or lists of them. tensors: by name."""

    def __init__(self, path: Path):
        """Raises UserError where it is no GGUF file, is cut off, is one of several parts, or has a type of tensors that
        is not read."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise UserError(f"{path}: cannot be read as a GGUF file ({error})") from None
        if self._bytes[:4] != MAGIC:
            raise UserError(f"{path}: not a GGUF file; name one, or a directory with config.json and safetensors")
        header = _Header(self._bytes)
        try:
            self.metadata, rows, data_start = header.read()
        except (struct.error, IndexError, OverflowError, RecursionError):
            raise UserError(f"{path}: cut off within its header; fetch it again") from None
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise UserError(
                f"{path}: one of {self.metadata['split.count']} parts; join them with `llama-gguf-split --merge`"
            )
        self.tensors = {row[0]: self._tensor(*row, data_start) for row in rows}

    def load(self, name: str) -> np.ndarray:
        """The tensor, dequantised: float32."""
        tensor = self.tensors[name]
        kind = GGMLQuantizationType[tensor.type]
        stored = np.frombuffer(self._bytes, np.uint8, count=tensor.size, offset=tensor.start)
        rows = math.prod(tensor.shape[:-1])
        stored = stored.reshape(rows, -1)
        whole = np.empty((rows, tensor.shape[-1]), np.float32)
        for start in range(0, rows, ROWS_AT_ONCE):
            whole[start : start + ROWS_AT_ONCE] = dequantize(stored[start : start + ROWS_AT_ONCE], kind)
        return whole.reshape(tensor.shape)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int) -> GGUFTensor:
        types = {each.value: each.name for each in GGMLQuantizationType}
        type_name = types.get(kind, f"number {kind}")
        if type_name not in READ_TYPES:
            raise UserError(f"{self.path}: {name} is of type {type_name}; these are read: {', '.join(READ_TYPES)}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        if not shape or shape[-1] % block:
            raise UserError(f"{self.path}: {name} of type {type_name} has rows of {shape[-1:]}, not of whole blocks")
        size = math.prod(shape) // block * block_bytes
        start = data_start + offset
        if start + size > len(self._bytes):
            missing = start + size - len(self._bytes)
            raise UserError(f"{self.path}: cut off: {missing:,} bytes of {name} are missing; fetch it again")
        return GGUFTensor(name, type_name, shape, start, size)


class _Header:
    """Reads from the start on. Raises struct.error or IndexError where the bytes end, ValueError for unknown parts."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._at = 4

    def read(self) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
        """Metadata, (name, shape, type, offset) of each tensor, and where the tensors' bytes start."""
        (version,) = self._take("I")
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version}; versions 2 and 3 in little-endian order are read")
        tensors, keys = self._take("QQ")
        metadata = {}
        for _ in range(self._plausible(keys)):
            key = self._text()
            metadata[key] = self._value(self._take("I")[0])
        rows = [self._row() for _ in range(self._plausible(tensors))]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment {alignment!r} is not a number of bytes")
        return metadata, rows, -(-self._at // alignment) * alignment

    def _row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (dimensions,) = self._take("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions: the file is corrupt; fetch it again")
        shape = self._take(f"{dimensions}Q")
        kind, offset = self._take("IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            (value,) = self._take(_NUMBERS[kind])
            return _shortest(value) if _NUMBERS[kind] == "f" else value
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of type {kind}, which GGUF does not have: the file is corrupt; fetch it again")
        element, count = self._take("IQ")
        if element in _NUMBERS:
            return list(self._take(f"{self._plausible(count)}{_NUMBERS[element]}"))
        return [self._value(element) for _ in range(self._plausible(count))]

    def _text(self) -> str:
        (length,) = self._take("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise IndexError
        return self._data[start : self._at].decode("utf-8", errors="replace")

    def _take(self, form: str) -> tuple[Any, ...]:
        taken = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return taken

    def _plausible(self, count: int) -> int:
        """A count of things of at least a byte each, which the rest of the file can hold."""
        if count > len(self._data) - self._at:
            raise IndexError
        return count


def _shortest(value: float) -> float:
    """The number that was meant: a float32 of 1e-5 is not 1e-5 as a double."""
    return float(str(np.float32(value)))
