"""A model and its cache: prefill, decode steps and scoring over slots, each of them one forward pass or a few.

One object, one thread: the arena has no locks. An array that a method returns as a view is valid until the next call.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike

from twinloop.common.errors import UserError
from twinloop.common.memory import available_bytes
from twinloop.models.adapter import Adapter
from twinloop.models.adapter_form import AdapterForm
from twinloop.models.chunks import PREFILL_CHUNK
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.exported import read_exported, read_own_adapter
from twinloop.models.memory import check_fits, serving_memory
from twinloop.models.onnx_graph import QUANTIZED, compute_type, slot_capacity
from twinloop.models.vocabulary import read_vocab_size
from twinloop.serving.engine.adapters import BASE, AdapterTables, LoadedAdapter
from twinloop.serving.engine.kv_cache import Device, KVArena, StepBinding
from twinloop.serving.engine.session import choose_device, open_bound, open_exported

# A binding costs some 30 us a layer to make and keeps its buffers: decode ranges and usual lengths stay, others go.
_BINDINGS_KEPT = 512
_BINDING_BYTES_KEPT = 256 << 20
_ROWS_KEPT = 16
"""Of logits that one sequence's binding has, to be kept: as many as a draft needs, and more. Those of a prompt whose
tokens are all scored are 16 MiB and more, of ever new lengths, and their pass takes far longer than to bind it."""


class ModelRunner:
    """`slots` sequences of at most `max_length` tokens each; `lengths` int32 [C]: tokens that each one holds, which are
    the first of its row of `tokens_CM`; `adapters_C` int64 [C]: numbers of the adapters that they are computed with.

    own: the adapter of all sequences for which no other one is named; BASE where the model has none.

    vocab_size: ids that the tokenizer has. Many published models have more rows in their embeddings, padded to a
    multiple that suits a GPU: an id of those means nothing, and is never drawn.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        config: DecoderConfig,
        *,
        precision: Precision,
        device: Device,
        slots: int,
        max_length: int,
        vocab_size: int | None = None,
        takes_adapters: bool = False,
    ):
        """vocab_size: by default that of the network. takes_adapters: whether the session's graph does."""
        self.config, self.precision, self.device = config, precision, device
        self.vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self.slots, self.max_length = slots, max_length
        self.lengths = np.zeros(slots, np.int32)
        self.adapters_C = np.zeros(slots, np.int64)
        self.own = BASE
        self._adapters = AdapterTables(config) if takes_adapters else None
        self._session = session
        element_type, dtype = compute_type(precision)
        self._arena = KVArena(
            config,
            slots=slots,
            capacity=slot_capacity(max_length),
            element_type=element_type,
            itemsize=dtype.itemsize,
            device=device,
        )
        self.tokens_CM = np.zeros((slots, self._arena.capacity), np.int64)
        self._bindings: OrderedDict[tuple[int, int, int, int], StepBinding] = OrderedDict()
        self._binding_bytes = 0

    @classmethod
    def load(
        cls,
        exported_dir: Path | str,
        *,
        slots: int = 8,
        max_length: int | None = None,
        provider: Device | None = None,
        threads: int | None = None,
        copies: int = 1,
    ) -> Self:
        """Open an exported model, with its own adapter where it has one. max_length: what it was exported for unless
        given; provider: the one its precision runs on; copies: processes that load it at the same time, this one
        included, each with memory of its own.

        Raises UserError where there is none, its integrity check fails, or its precision cannot run on this machine;
        and, on CPU, where it needs more memory than is available, before any is taken.
        """
        exported_dir = Path(exported_dir)
        exported, config = read_exported(exported_dir)
        if slots < 1:
            raise UserError(f"engine: slots is {slots}; it must be at least 1")
        if max_length is not None and not 2 <= max_length <= exported.max_length:
            raise UserError(
                f"engine: max_length {max_length} is outside 2..{exported.max_length}, the range that {exported_dir} "
                f"was exported for"
            )
        device = choose_device(exported.precision, provider)
        max_length = max_length or exported.max_length
        own = read_own_adapter(exported_dir, config) if exported.takes_adapters else None
        if device == "cpu":
            plan = serving_memory(
                config,
                precision=exported.precision,
                slots=slots,
                max_length=max_length,
                adapter_ranks=0 if own is None else own.max_rank,
            )
            what = f"{exported_dir} ({exported.precision}, slots {slots:,}, max_length {max_length:,})"
            check_fits(plan, available_bytes(), what=what, copies=copies)
        runner = cls(
            open_exported(exported_dir, config, device=device, threads=threads),
            config,
            precision=exported.precision,
            device=device,
            slots=slots,
            max_length=max_length,
            vocab_size=read_vocab_size(exported_dir),
            takes_adapters=exported.takes_adapters,
        )
        if own is not None:
            runner.own = runner.load_adapter("own", own)
            runner.reset()
        return runner

    @classmethod
    def from_weights(
        cls,
        config: DecoderConfig,
        initializers: Mapping[str, ort.OrtValue],
        *,
        max_length: int,
        slots: int = 8,
        precision: Precision | None = None,
        threads: int | None = None,
        vocab_size: int | None = None,
        lora: AdapterForm | None = None,
    ) -> Self:
        """The same graph over the caller's own tensors: a change made in place shows in the next run.

        initializers: every weight by its Hugging Face name, e.g. `OrtValue.from_dlpack(parameter.detach())`, all on
        one device, contiguous, of one float type. They must outlive the runner. Work on a CUDA weight must be finished
        (synchronised) before it is used. precision: float32 on CPU, bf16 on CUDA unless given; weights of
        another type are cast in every run. vocab_size: of the tokenizer, where that has fewer ids than the network.
        lora: the form of an adapter whose A and B are among the initializers.
        """
        device: Device = "cpu" if next(iter(initializers.values())).device_name().lower() == "cpu" else "cuda"
        precision = precision or ("fp32" if device == "cpu" else "bf16")
        if precision in QUANTIZED:
            raise UserError(f"engine: {precision} needs weights of its own; export the model, or bind them as fp32")
        choose_device(precision, device)
        session = open_bound(
            config,
            initializers,
            precision=precision,
            capacity=slot_capacity(max_length),
            device=device,
            threads=threads,
            lora=lora,
        )
        runner = cls(
            session,
            config,
            precision=precision,
            device=device,
            slots=slots,
            max_length=max_length,
            vocab_size=vocab_size,
        )
        runner._owned = dict(initializers)  # the session only borrows them
        return runner

    _owned: Mapping[str, ort.OrtValue] | None = None

    # --- adapters -------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Hold an adapter beside the weights, for the sequences that are to have it; of whatever rank it is.

        Raises UserError where the model takes none, or the memory for it is not available.
        """
        if self._adapters is None:
            raise UserError(
                f"engine: {name}: this model takes no adapters; export one with `export: {{adapters: true}}`"
            )
        return self._adapters.load(name, adapter)

    def drop_adapter(self, adapter: LoadedAdapter) -> None:
        """Free the memory of an adapter that no sequence uses any more."""
        assert self._adapters is not None
        assert adapter is not self.own
        self._adapters.drop(adapter)

    # --- steps ----------------------------------------------------------------------------------------------------

    def prefill(self, slot: int, tokens: ArrayLike, *, start: int = 0, chunk: int = PREFILL_CHUNK) -> np.ndarray:
        """Put tokens [L] into a slot from position `start` on; what the slot held from there is forgotten.

        start: at most the slot's length; the adapter is the slot's. Returns the logits after the last token, float32
        [V], a view.
        """
        tokens_L = self._tokens(tokens, start)
        assert start <= self.lengths[slot], "a slot has no gaps"
        logits_V = np.empty(0, np.float32)
        for begin in range(0, len(tokens_L), chunk):
            part_L = tokens_L[begin : begin + chunk]
            logits_V = self._append(slot, part_L, start + begin, rows=1)[0]
        return logits_V

    def decode(self, first: int, tokens_B: np.ndarray, active_B: np.ndarray) -> np.ndarray:
        """One step of the slots first .. first + B: append a token to each active one, whatever their lengths.

        tokens_B: int64, active_B: bool. Idle rows go along unchanged (their tokens are ignored), active ones must not
        be full. Returns logits float32 [B, V], a view; those of idle rows mean nothing.
        """
        count = len(tokens_B)
        step = self._binding(first, count, 1, count)
        lengths_B = self.lengths[first : first + count]
        step.tokens[:, 0] = tokens_B
        # An idle row's token lands behind the slot's last one, where the next real token overwrites it.
        step.seqlens[:] = lengths_B
        step.total[()] = lengths_B.max() + 1
        if self._adapters is not None:
            step.adapt(np.where(active_B, self.adapters_C[first : first + count], BASE.number))
        logits_BV = step.run()
        active = np.flatnonzero(active_B)
        self.tokens_CM[first + active, lengths_B[active]] = tokens_B[active]
        lengths_B += active_B
        return logits_BV

    def extend(self, slot: int, tokens: ArrayLike) -> np.ndarray:
        """Append tokens [L] to a slot. Returns the logits after each of them, float32 [L, V], a view."""
        start = int(self.lengths[slot])
        tokens_L = self._tokens(tokens, start)
        return self._append(slot, tokens_L, start, rows=len(tokens_L))

    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Give other slots the first `length` tokens of a slot, as if each had been prefilled with them."""
        assert length <= self.lengths[source]
        self._arena.copy_prefix(self._session, source, targets, length)
        self.adapters_C[list(targets)] = self.adapters_C[source]
        self.tokens_CM[list(targets), :length] = self.tokens_CM[source, :length]
        self.lengths[list(targets)] = length

    def swap(self, slot: int, other: int) -> None:
        """Exchange what two slots hold."""
        pair = [slot, other]
        self._arena.swap(self._session, slot, other, int(self.lengths[pair].max()))
        for state in (self.tokens_CM, self.lengths, self.adapters_C):
            state[pair] = state[pair[::-1]]

    def hold(self, slots: Sequence[int], length: int, adapter: LoadedAdapter) -> None:
        """Say that slots hold `length` tokens, computed with this adapter, and go on with it."""
        self.lengths[list(slots)] = length
        self.adapters_C[list(slots)] = adapter.number

    def score(
        self, tokens: ArrayLike, *, slot: int = 0, chunk: int = PREFILL_CHUNK, adapter: LoadedAdapter | None = None
    ) -> np.ndarray:
        """Teacher forcing: the logits after every token, float32 [L, V]. Uses up the slot's content.

        adapter: None for the model's own.
        """
        tokens_L = self._tokens(tokens, 0)
        self.hold([slot], 0, adapter or self.own)
        logits_LV = np.empty((len(tokens_L), self.config.num_outputs), np.float32)
        for begin in range(0, len(tokens_L), chunk):
            part_L = tokens_L[begin : begin + chunk]
            logits_LV[begin : begin + len(part_L)] = self._append(slot, part_L, begin, rows=len(part_L))
        return logits_LV

    def reset(self) -> None:
        """Forget every slot's content."""
        self.hold(range(self.slots), 0, self.own)

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """Raise UserError unless the prompt has tokens, all of the vocabulary, and can be continued by one more."""
        if not 0 < len(tokens) < self.max_length:
            raise UserError(
                f"prompt: {len(tokens)} tokens, but a slot holds 1 to {self.max_length - 1} "
                f"and an answer's first; shorten it or export the model with a larger max_length"
            )
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise UserError(f"prompt: token ids must lie in 0..{self.vocab_size - 1}; encode with its tokenizer")

    # --- inside ---------------------------------------------------------------------------------------------------

    def _append(self, slot: int, tokens_L: np.ndarray, start: int, *, rows: int) -> np.ndarray:
        """Run tokens on top of a slot's first `start`; the logits of the last `rows` positions."""
        length = len(tokens_L)
        step = self._binding(slot, 1, length, rows)
        step.tokens[0] = tokens_L
        step.seqlens[0] = start + length - 1
        step.total[()] = start + length
        step.score(np.arange(length - rows, length))
        if self._adapters is not None:
            step.adapt(self.adapters_C[slot : slot + 1])
        self.lengths[slot] = start  # also where the run fails, which may have written some layers
        logits = step.run()
        self.tokens_CM[slot, start : start + length] = tokens_L
        self.lengths[slot] = start + length
        return logits

    def _tokens(self, tokens: ArrayLike, start: int) -> np.ndarray:
        tokens_L = np.asarray(tokens, np.int64)
        if not 0 < len(tokens_L) <= self.max_length - start:
            raise UserError(
                f"prompt: {len(tokens_L)} tokens from position {start} on, but a slot holds 1 to {self.max_length}; "
                f"shorten it or export the model with a larger max_length"
            )
        return tokens_L

    def _binding(self, first: int, count: int, length: int, rows: int) -> StepBinding:
        key = (first, count, length, rows)
        step = self._bindings.get(key)
        if step is None:
            step = StepBinding(
                self._session,
                self._arena,
                first=first,
                count=count,
                length=length,
                rows=rows,
                outputs=self.config.num_outputs,
                adapters=self._adapters,
            )
            if count == 1 and rows > _ROWS_KEPT:
                return step
            self._bindings[key] = step
            self._binding_bytes += step.logits.nbytes
            while len(self._bindings) > 1 and (
                len(self._bindings) > _BINDINGS_KEPT or self._binding_bytes > _BINDING_BYTES_KEPT
            ):
                _, dropped = self._bindings.popitem(last=False)
                self._binding_bytes -= dropped.logits.nbytes
        else:
            self._bindings.move_to_end(key)
        return step
