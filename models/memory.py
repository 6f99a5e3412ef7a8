"""Memory and compute that a network needs, before anything is allocated: what `twinloop plan` prints.

Weights, scales, gradients, optimizer state and KV cache are exact. Activations, runtime buffers and time are estimates:
they depend on kernels, and say so in their names' documentation.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from twinloop.common.errors import UserError
from twinloop.models.adapter_form import AdapterForm, linear_layers
from twinloop.models.chunks import PREFILL_CHUNK, logit_chunk
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.onnx_graph import QUANTIZED, compute_type, slot_capacity
from twinloop.models.onnx_quantize import FOUR_BIT_BLOCK, choose_block_size, takes_four_bits
from twinloop.models.shapes import hidden_matrices, is_hidden_matrix, weight_shapes


@dataclass(frozen=True)
class _Plan:
    """Bytes by what they hold."""

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def rows(self) -> list[tuple[str, int]]:
        """(name, bytes) of every part, in order, then the total."""
        parts = [(field.name.removesuffix("_bytes"), getattr(self, field.name)) for field in fields(self)]
        return [*parts, ("total", self.total_bytes)]


@dataclass(frozen=True)
class ServingMemory(_Plan):
    """Memory of an engine. `weights` is the packed size alone; quantisation's `scales` are counted separately."""

    weights_bytes: int
    scales_bytes: int
    kv_cache_bytes: int
    runtime_bytes: int


@dataclass(frozen=True)
class TrainingMemory(_Plan):
    """Memory of a training step. `activations` are those of one micro-batch, kept for its backward pass."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    reference_bytes: int
    reward_models_bytes: int
    activations_bytes: int
    logits_bytes: int


def serving_memory(
    config: DecoderConfig,
    *,
    precision: Precision,
    slots: int,
    max_length: int,
    prefill_chunk: int = PREFILL_CHUNK,
    adapter_ranks: int = 0,
) -> ServingMemory:
    """Memory to serve `slots` requests of up to `max_length` tokens each, prompt and answer together.

    In int8 and int4 the matrices are quantised in blocks, with one float32 scale a block, and a zero point where they
    have four bits; the embedding table and the output projection, one table where they are tied, have eight in both.
    Adapters beside the weights, of `adapter_ranks` ranks in all, count as weights. The cache has the type of the
    activations and holds a slot's length rounded up. The runtime's buffers are an estimate: the widest layer of one
    prefill chunk, its attention scores, and the logits of every slot.
    """
    _positive(slots=slots, max_length=max_length, prefill_chunk=prefill_chunk)
    cell = compute_type(precision)[1].itemsize
    in_matrices = sum(rows * columns for rows, columns in hidden_matrices(config))
    tables = 1 if config.tie_word_embeddings else 2
    vectors = config.num_parameters - in_matrices - tables * config.vocab_size * config.hidden_size
    if precision in QUANTIZED:
        matrices = {name: shape for name, shape in weight_shapes(config).items() if is_hidden_matrix(name, shape)}
        blocked = [
            _blocked(*shape, four_bits=precision == "int4" and takes_four_bits(name))
            for name, shape in matrices.items()
        ]
        blocked += tables * [_blocked(config.vocab_size, config.hidden_size, four_bits=False)]
        weights = sum(values for values, _ in blocked) + cell * vectors
        scales = sum(scales for _, scales in blocked)
    else:
        weights, scales = cell * config.num_parameters, 0
    chunk = min(prefill_chunk, max_length)
    heads = config.num_attention_heads
    queries_keys_values = (heads + 2 * config.num_key_value_heads) * config.head_dim
    widest = 2 * config.hidden_size + max(queries_keys_values, 3 * config.intermediate_size)
    runtime = cell * chunk * widest + 4 * heads * chunk * max_length + 4 * slots * config.vocab_size
    return ServingMemory(
        weights_bytes=weights + adapters_bytes(config, adapter_ranks),
        scales_bytes=scales,
        kv_cache_bytes=config.kv_cache_bytes_per_token * cell * slots * slot_capacity(max_length),
        runtime_bytes=runtime,
    )


def adapters_bytes(config: DecoderConfig, ranks: int) -> int:
    """Adapters beside the weights that have so many ranks in all: A and B of every linear layer, in float32."""
    return 4 * ranks * sum(map(sum, linear_layers(config).values()))


class NotEnoughMemoryError(UserError):
    """An engine needs more memory than is available now."""


def check_fits(plan: ServingMemory, available: int, *, what: str, copies: int = 1) -> None:
    """Raises NotEnoughMemoryError, with the sizes, where so many engines need more than the available bytes.
    what: is to be served."""
    needed = copies * plan.total_bytes
    if needed <= available:
        return
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:,.1f}" for name, size in plan.rows()[:-1])
    there, each, fewer = ("", "", "") if copies == 1 else (f" in {copies} processes", "in each: ", "fewer processes, ")
    raise NotEnoughMemoryError(
        f"engine: {what}{there} needs {needed / 2**20:,.1f} MiB of memory ({each}{parts}), and "
        f"{available / 2**20:,.1f} MiB are available; take {fewer}fewer slots, a smaller max_length or fewer bits"
    )


def training_memory(
    config: DecoderConfig,
    *,
    micro_batch_tokens: int,
    optimizer: Literal["muon", "adamw"] = "muon",
    device: Literal["cpu", "cuda"] = "cpu",
    reference: bool = False,
    reward_models: Sequence[DecoderConfig] = (),
    lora: AdapterForm | None = None,
) -> TrainingMemory:
    """Memory of one training step on float32 master weights; on CUDA it computes in bf16.

    Muon keeps one momentum for each hidden matrix's weight, AdamW two moments for everything else. `reference` adds a
    frozen copy of the network, `reward_models` their weights. Activations and logits are estimates, the former within
    some 10% on CPU: all that the layers keep for the backward pass without recomputation (on CPU, where scores are
    capped, those of every head too); and one chunk of the vocabulary's logits with their gradient.

    With `lora` gradients and moments are those of the adapter, AdamW's, and the reference is the base itself.
    """
    _positive(micro_batch_tokens=micro_batch_tokens)
    adapter = lora.num_parameters(config) if lora else 0
    trained = adapter or config.num_parameters
    in_matrices = sum(rows * columns for rows, columns in hidden_matrices(config))
    muon = in_matrices if optimizer == "muon" and not lora else 0
    scores = 0 if config.attention_softcap is None else 2 * config.num_attention_heads * config.num_hidden_layers
    cell, capped = (2, 0) if device == "cuda" else (4, scores * min(micro_batch_tokens, config.max_position_embeddings))
    return TrainingMemory(
        weights_bytes=4 * (config.num_parameters + adapter),
        gradients_bytes=4 * trained,
        optimizer_bytes=4 * muon + 8 * (trained - muon),
        reference_bytes=4 * config.num_parameters if reference and not lora else 0,
        reward_models_bytes=sum(4 * model.num_parameters for model in reward_models),
        activations_bytes=micro_batch_tokens * cell * (_kept_activations(config) + capped),
        logits_bytes=2 * 4 * min(logit_chunk(config.vocab_size), micro_batch_tokens) * config.vocab_size,
    )


def flops_per_token(config: DecoderConfig, *, context: float, training: bool, frozen: bool = False) -> float:
    """Floating-point operations for one token that attends to `context` tokens.

    Two for each weight it is multiplied with (the input embedding is looked up, the output projection is not), and
    four a head's width for each token attended to; a backward pass costs twice the forward one: 6N and attention.
    For whole documents of L tokens the mean context is L / 2. A layer with a window reaches no further than that.
    frozen: the weights take no gradient, as below an adapter, whose own few products are left out.
    """
    projection = config.vocab_size * config.hidden_size
    weights = sum(rows * columns for rows, columns in hidden_matrices(config)) + projection
    reached = sum(min(context, kind.window or context) for kind in config.layer_kinds)
    attention = 4 * config.num_attention_heads * config.head_dim * reached
    if not training:
        return 2 * weights + attention
    return 2 * weights * (2 if frozen else 3) + 3 * attention


def _blocked(rows: int, columns: int, *, four_bits: bool) -> tuple[int, int]:
    """Bytes of a quantised matrix: (values, scales and zero points). A row is filled up to whole blocks."""
    size = FOUR_BIT_BLOCK if four_bits else choose_block_size(columns)
    blocks = -(-columns // size)
    if four_bits:
        return rows * blocks * size // 2, rows * (4 * blocks + -(-blocks // 2))
    return rows * blocks * size, 4 * rows * blocks


def _kept_activations(config: DecoderConfig) -> int:
    """Values a token keeps for the backward pass.

    A layer keeps: the input and output of both norms; queries, keys and values as attention reads them, and its output;
    gate, up, the activated gate and their product; the normed outputs of attention and MLP where they have a norm. Then
    the final norm's input and output.
    """
    D, F, E = config.hidden_size, config.intermediate_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    norms = 6 if config.post_norms else 4
    return config.num_hidden_layers * (norms * D + heads * E + 4 * F) + 2 * D


def _positive(**sizes: float) -> None:
    for name, size in sizes.items():
        if not size > 0:
            raise UserError(f"plan: {name} is {size}; it must be more than 0")
