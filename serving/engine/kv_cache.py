"""The key-value cache: one arena a layer, allocated once, read and written by address.

GroupQueryAttention appends to its cache in place when past and present are the same memory. So every contiguous range
of slots is bound by address as both, and no step copies a cache byte.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnxruntime as ort

from twinloop.models.config import DecoderConfig
from twinloop.serving.engine.adapters import AdapterBinding, AdapterTables

Device = Literal["cpu", "cuda"]

_PAGE_BYTES = 4096


class KVArena:
    """Keys and values of all layers, each one block [C, K, M, E] on the device."""

    def __init__(self, config: DecoderConfig, *, slots: int, capacity: int, element_type: int, itemsize: int,
                 device: Device):  # fmt: skip
        self.slots, self.capacity, self.element_type, self.device = slots, capacity, element_type, device
        self.slot_shape = (config.num_key_value_heads, capacity, config.head_dim)
        self.itemsize = itemsize
        self.slot_bytes = int(np.prod(self.slot_shape)) * itemsize
        self.names = [f"{index}.{kind}" for index in range(config.num_hidden_layers) for kind in ("key", "value")]
        self.nbytes = slots * self.slot_bytes * len(self.names)
        self._blocks = [_Block(slots * self.slot_bytes, device) for _ in self.names]
        self._views: dict[int, list[ort.OrtValue]] = {}

    def address(self, block: int, slot: int) -> int:
        """Where a slot's part of a block begins."""
        return self._blocks[block].address + slot * self.slot_bytes

    def bind(self, binding: ort.IOBinding, first: int, count: int) -> None:
        """Bind slots first .. first + count as past and as present: the same addresses."""
        shape = (count, *self.slot_shape)
        for block, name in enumerate(self.names):
            at = self.address(block, first)
            binding.bind_input(f"past_key_values.{name}", self.device, 0, self.element_type, shape, at)
            binding.bind_output(f"present.{name}", self.device, 0, self.element_type, shape, at)

    def copy_prefix(self, session: ort.InferenceSession, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of a slot to other slots (on CUDA the whole slot, device to device)."""
        if self.device == "cpu":
            for block in self._blocks:
                slots = block.memory.reshape(self.slots, self.slot_shape[0], -1)
                used = length * self.slot_shape[2] * self.itemsize
                for target in targets:
                    slots[target, :, :used] = slots[source, :, :used]
            return
        for target in targets:
            for to, source_view in zip(self._slot(session, target), self._slot(session, source), strict=True):
                to.update_inplace(source_view)

    def swap(self, session: ort.InferenceSession, slot: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots (on CUDA the whole slots, through one block's memory)."""
        if self.device == "cpu":
            used = length * self.slot_shape[2] * self.itemsize
            for block in self._blocks:
                pair = block.memory.reshape(self.slots, self.slot_shape[0], -1)[:, :, :used]
                pair[[slot, other]] = pair[[other, slot]]
            return
        spare_block = _Block(self.slot_bytes, self.device)
        (spare,) = self._views_at(session, [spare_block.address])
        for one, two in zip(self._slot(session, slot), self._slot(session, other), strict=True):
            spare.update_inplace(one)
            one.update_inplace(two)
            two.update_inplace(spare)

    def _slot(self, session: ort.InferenceSession, slot: int) -> list[ort.OrtValue]:
        """One OrtValue a block over a slot's memory."""
        if slot not in self._views:
            addresses = [self.address(block, slot) for block in range(len(self.names))]
            self._views[slot] = self._views_at(session, addresses)
        return self._views[slot]

    def _views_at(self, session: ort.InferenceSession, addresses: Sequence[int]) -> list[ort.OrtValue]:
        """OrtValues of a slot's shape, at most one a block. Only a binding can make them from an address."""
        binding, shape = session.io_binding(), (1, *self.slot_shape)
        for name, address in zip(self.names, addresses, strict=False):
            binding.bind_output(f"present.{name}", self.device, 0, self.element_type, shape, address)
        views: list[ort.OrtValue] = binding.get_outputs()
        return views


class _Block:
    """Zeroed bytes: page-aligned host memory, or one allocation on the device."""

    def __init__(self, nbytes: int, device: Device):
        if device == "cpu":
            raw = np.zeros(nbytes + _PAGE_BYTES, np.uint8)
            start = -raw.ctypes.data % _PAGE_BYTES
            self.memory = raw[start : start + nbytes]
            self.address = self.memory.ctypes.data
        else:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type([nbytes], np.uint8, device, 0)
            self.value.update_inplace(np.zeros(nbytes, np.uint8))
            self.address = self.value.data_ptr()


class StepBinding:
    """Everything that one shape of run reads and writes, bound once and changed in place.

    The caller fills `tokens` int64 [B, L], `seqlens` int32 [B] and `total`, then calls `run`, and reads `logits`
    float32 [N, V] before the next run of this binding. `score` sets which of the B*L positions those are.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        arena: KVArena,
        *,
        first: int,
        count: int,
        length: int,
        rows: int,
        outputs: int,
        adapters: AdapterTables | None = None,
    ):
        """adapters: of a graph that takes them; `adapt` says which."""
        self._session = session
        self._binding = session.io_binding()
        self.tokens = np.zeros((count, length), np.int64)
        self.seqlens = np.zeros(count, np.int32)
        self.total = np.zeros((), np.int32)
        self.logit_rows = np.arange(rows, dtype=np.int64)
        self.logits = np.zeros((rows, outputs), np.float32)
        inputs: dict[str, np.ndarray] = {
            "input_ids": self.tokens,
            "seqlens_k": self.seqlens,
            "logit_rows": self.logit_rows,
        }
        self._on_device: dict[str, tuple[ort.OrtValue, np.ndarray]] = {}
        for name, array in inputs.items():
            address = array.ctypes.data
            if arena.device != "cpu":
                value = ort.OrtValue.ortvalue_from_numpy(array, arena.device, 0)
                self._on_device[name] = value, array
                address = value.data_ptr()
            self._binding.bind_input(name, arena.device, 0, array.dtype, array.shape, address)
        # The operator reads this one on the host, and ONNX Runtime brings the logits there.
        self._binding.bind_input("total_sequence_length", "cpu", 0, np.int32, (), self.total.ctypes.data)
        self._binding.bind_output("logits", "cpu", 0, np.float32, self.logits.shape, self.logits.ctypes.data)
        arena.bind(self._binding, first, count)
        self._adapters = None if adapters is None else AdapterBinding(adapters, self._binding)

    def adapt(self, numbers_B: np.ndarray) -> None:
        """Choose each row's adapter: int64 [B], the numbers of loaded ones, or 0 for none. Of a graph that takes them,
        before every run."""
        assert self._adapters is not None
        self._adapters.choose(numbers_B)

    def score(self, rows: np.ndarray) -> None:
        """Choose the positions whose logits are computed: int64 [N], indices into B*L. At first: the first N."""
        self.logit_rows[:] = rows
        self._upload("logit_rows")

    def run(self) -> np.ndarray:
        """One pass of the graph. Returns `logits`, valid until the next run of this binding."""
        self._upload("input_ids", "seqlens_k")
        self._session.run_with_iobinding(self._binding)
        return self.logits

    def _upload(self, *names: str) -> None:
        """Bring inputs to the device, finished when this returns. On CPU the engine reads them where they are."""
        for name in names:
            if name in self._on_device:
                value, array = self._on_device[name]
                value.update_inplace(array)
