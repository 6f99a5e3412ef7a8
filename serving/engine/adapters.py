"""LoRA adapters beside the weights of one model: each row of a batch is computed with its own, or with none.

All that are loaded lie below each other in one table for each factor of each linear layer, R ranks in all, whatever
the rank of each one is: nothing is padded to the largest. A pass gets the part of the tables that holds the adapters of
its rows, by address, and multiplies with all of that part; a row keeps the ranks of its own adapter and gets zeros for
all others. So a prompt is read with its own adapter alone, a step reads each adapter once however many rows have it,
and rows without one get exactly what the weights alone give them.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Final

import numpy as np
import onnxruntime as ort

from twinloop.common.errors import UserError
from twinloop.common.memory import available_bytes
from twinloop.models.adapter import Adapter
from twinloop.models.adapter_form import linear_layers
from twinloop.models.config import DecoderConfig
from twinloop.models.memory import adapters_bytes
from twinloop.models.onnx_graph import ADAPTER_RANKS, row_adapter_inputs


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that an engine holds. number: of this loading, and of no other, so that what slots hold of a dropped
    adapter is never taken for another one's."""

    name: str
    number: int
    rank: int


BASE: Final = LoadedAdapter("base", 0, 0)
"""No adapter."""


class AdapterTables:
    """A and B of all loaded adapters. Not safe for many threads: it belongs to its engine."""

    def __init__(self, config: DecoderConfig):
        self.changes = 0  # so that what is bound is known to be outdated
        self.adapter_R = np.zeros(0, np.int64)  # the number of the adapter that has this rank
        self._numbers = count(1)
        self._config = config
        # A [R, in], and B [R, out] with the adapter's scale in it, by the layer's name.
        self._tables = {
            layer: (np.zeros((0, into), np.float32), np.zeros((0, out), np.float32))
            for layer, (out, into) in linear_layers(config).items()
        }

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for tables in self._tables.values() for table in tables)

    def load(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Raises UserError where the memory for it is not available."""
        rank = adapter.max_rank
        needed, available = adapters_bytes(self._config, rank), available_bytes()
        if needed > available:
            raise UserError(
                f"engine: the adapter {name} (rank {rank}) needs {needed / 2**20:,.1f} MiB of memory, and "
                f"{available / 2**20:,.1f} MiB are available; serve fewer adapters"
            )
        self.changes += 1
        held = len(self.adapter_R)
        for layer, tables in self._tables.items():
            a, b = (np.zeros((held + rank, table.shape[1]), np.float32) for table in tables)
            a[:held], b[:held] = (table[:held] for table in tables)
            if layer in adapter.factors:
                down, up = adapter.factors[layer]
                own = slice(held, held + len(down))
                a[own], b[own] = down, np.float32(adapter.scale(layer)) * up.T
            self._tables[layer] = a, b
        loaded = LoadedAdapter(name, next(self._numbers), rank)
        self.adapter_R = np.append(self.adapter_R, np.full(rank, loaded.number))
        return loaded

    def drop(self, adapter: LoadedAdapter) -> None:
        """The others stay what they are, in other places."""
        kept_R = self.adapter_R != adapter.number
        self.changes += 1
        kept = np.flatnonzero(kept_R)
        self._tables = {layer: (a[kept], b[kept]) for layer, (a, b) in self._tables.items()}
        self.adapter_R = self.adapter_R[kept_R]

    def part(self, numbers_B: np.ndarray) -> tuple[int, int]:
        """Where the ranks of all these adapters lie: from the first to behind the last; (0, 0) where there are none."""
        places = np.flatnonzero(np.isin(self.adapter_R, numbers_B))
        return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)

    def bind(self, binding: ort.IOBinding, first: int, end: int) -> None:
        """Bind the ranks first .. end of every table, where they are."""
        for layer, tables in self._tables.items():
            for name, table in zip(row_adapter_inputs(layer), tables, strict=True):
                part = table[first:end]
                binding.bind_input(name, "cpu", 0, part.dtype, part.shape, part.ctypes.data)


class AdapterBinding:
    """The adapters of one shape of run: bound anew only where they are others than in its last run."""

    def __init__(self, tables: AdapterTables, binding: ort.IOBinding):
        self._tables, self._binding = tables, binding
        self._changes = -1
        self._numbers_B = np.zeros(0, np.int64)
        self._ranks_B1R = np.zeros((0, 1, 0), np.float32)

    def choose(self, numbers_B: np.ndarray) -> None:
        """Let the next run compute each row with the adapter of this number."""
        tables = self._tables
        if tables.changes == self._changes and np.array_equal(numbers_B, self._numbers_B):
            return
        first, end = tables.part(numbers_B)
        self._ranks_B1R = (tables.adapter_R[first:end] == numbers_B[:, None, None]).astype(np.float32)
        ranks = self._ranks_B1R
        self._binding.bind_input(ADAPTER_RANKS, "cpu", 0, ranks.dtype, ranks.shape, ranks.ctypes.data)
        tables.bind(self._binding, first, end)
        self._changes, self._numbers_B = tables.changes, numbers_B.copy()
