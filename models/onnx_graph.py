"""The decoder as an ONNX graph, written node by node: no tracing, no torch.

A weight keeps its Hugging Face name and torch's [out, in] layout, so a trainer's own tensor can replace it
(`serving.engine.Engine.from_weights`). One graph serves prefill, chunks of a prefill, decode steps and scoring:

    input_ids              int64 [B, L]
    seqlens_k              int32 [B]           length of each row with its new tokens, less one
    total_sequence_length  int32 []            the longest of them, on the host
    logit_rows             int64 [N]           which of the B*L positions are projected to the vocabulary
    past_key_values.i.key / .value   [B, K, M, E]   a range of cache slots, also written: bound as present too
    logits                 float32 [N, V]; of a network with labels, theirs
    present.i.key / .value           [B, K, M, E]

With `row_adapters` each row of the batch has a LoRA adapter of its own, or none. The adapters lie below each other, R
ranks in all, whatever each one's rank is; a linear layer multiplies with all of them and keeps a row's own ranks:

    adapter_ranks          [B, 1, R]    1 for the ranks of the row's adapter, 0 for all others
    <layer>.lora_A         [R, in]      of each linear layer inside the network's layers
    <layer>.lora_B         [R, out]     transposed, with the adapter's scale in it

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import ml_dtypes
import numpy as np
from onnx import ModelProto, TensorProto, helper

from twinloop.models.adapter_form import LORA_A, LORA_B, AdapterForm, linear_layers
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.onnx_nodes import GraphNodes
from twinloop.models.onnx_quantize import quantize_blocks, quantize_four_bit_blocks, takes_four_bits
from twinloop.models.rope import Rope
from twinloop.models.shapes import HEAD, weight_shapes

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTIZED: frozenset[Precision] = frozenset(("int8", "int4"))
"""Their weights are made anew, and cannot be somebody else's tensors."""
WITH_ROW_ADAPTERS: tuple[Precision, ...] = ("fp32", "int8", "int4")
"""Those with which the graph can take adapters: what runs on CPU. A and B are float32 beside quantised weights."""

MICROSOFT = "com.microsoft"

# What flows between the nodes. int8 and int4 quantise weights; activations and the cache stay float32.
_COMPUTE: dict[Precision, tuple[int, np.dtype]] = {
    "fp32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "int8": (TensorProto.FLOAT, np.dtype(np.float32)),
    "int4": (TensorProto.FLOAT, np.dtype(np.float32)),
}


ADAPTER_RANKS = "adapter_ranks"
"""Name of the graph's input that says which ranks are whose."""


def row_adapter_inputs(layer: str) -> tuple[str, str]:
    """The graph's inputs for the A and B of a linear layer."""
    return f"{layer}.lora_A", f"{layer}.lora_B"


def compute_type(precision: Precision) -> tuple[int, np.dtype]:
    """ONNX element type and numpy dtype of activations and cache."""
    return _COMPUTE[precision]


def slot_capacity(max_length: int) -> int:
    """Positions of a cache slot: one more than its tokens, rounded up.

    The spare one takes what a batched step writes for a slot that is full and only sits between two active ones.
    """
    return -(-(max_length + 1) // 16) * 16


def build_graph(
    config: DecoderConfig,
    tensors: Mapping[str, np.ndarray] | None,
    *,
    precision: Precision,
    capacity: int,
    weights_type: int | None = None,
    lora: AdapterForm | None = None,
    row_adapters: bool = False,
) -> ModelProto:
    """The graph with its weights; with `tensors=None`, weights are declared without data, to be bound by the caller.

    capacity: positions M of a cache slot, which is also the reach of the rotary tables.
    weights_type: ONNX element type of the bound weights where it differs from the precision's (a trainer's float32
    masters under bf16): the graph then casts them in every run.
    lora: an adapter beside the bound weights, whose A and B are bound too; that of a model directory is merged.
    row_adapters: adapters are inputs, and each row of the batch has its own.

    Without tensors, every weight is external data (`onnx_nodes.unbound_bytes`).
    """
    assert tensors is not None or precision not in QUANTIZED, "bound weights cannot be quantised"
    assert tensors is None or lora is None, "an adapter is merged into weights that are not bound"
    graph = _Graph(config, tensors, precision, capacity, weights_type, lora, row_adapters)
    return graph.build()


class _Graph(GraphNodes):
    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, np.ndarray] | None,
        precision: Precision,
        capacity: int,
        weights_type: int | None,
        lora: AdapterForm | None,
        row_adapters: bool,
    ):
        """As `build_graph`."""
        shapes = weight_shapes(config) | (lora.shapes(config) if lora else {})
        super().__init__(tensors, shapes, _COMPUTE[precision], weights_type)
        self.config, self.precision, self.capacity = config, precision, capacity
        self.lora, self.row_adapters = lora, row_adapters
        self.adapted_by_row = linear_layers(config) if row_adapters else {}
        self.rotary_tables: dict[Rope | None, tuple[str, ...]] = {}
        self.blocks: dict[str, tuple[list[str], dict[str, int]]] = {}

    def build(self) -> ModelProto:
        config = self.config
        self._make_rotary_tables()
        self._constant("flat_shape", np.array([-1, config.hidden_size], np.int64))
        if config.qk_norm:
            for kind, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                self._constant(f"{kind}_heads_shape", np.array([0, 0, heads, config.head_dim], np.int64))
                self._constant(f"{kind}_flat_shape", np.array([0, 0, heads * config.head_dim], np.int64))

        residual = self._embedding()
        normed = self._norm(residual, "model.layers.0.input_layernorm.weight")
        # The norm that reads the sum of residual and attention, and the ones of the sublayers' own outputs.
        before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        for index in range(config.num_hidden_layers):
            layer = f"model.layers.{index}"
            attended = self._attention(normed, layer, index)
            if config.post_norms:
                attended = self._norm(attended, f"{layer}.post_attention_layernorm.weight")
            normed, residual = self._add_norm(attended, residual, f"{layer}.{before_mlp}.weight")
            fed = self._mlp(normed, layer)
            if config.post_norms:
                fed = self._norm(fed, f"{layer}.post_feedforward_layernorm.weight")
            last = index + 1 == config.num_hidden_layers
            following = "model.norm.weight" if last else f"model.layers.{index + 1}.input_layernorm.weight"
            normed, residual = self._add_norm(fed, residual, following)
        self._logits(normed)
        return self._model()

    # --- parts of the network -------------------------------------------------------------------------------------

    def _embedding(self) -> str:
        name = "model.embed_tokens.weight"
        if self.precision in QUANTIZED:
            rows = self._quantized_rows(name)
        else:  # the table is gathered before it is cast: a few rows, not the vocabulary
            rows = self._to_compute(self._node("Gather", [self._stored(name), "input_ids"], "embedded"))
        scale = self.config.embedding_scale
        if scale == 1:
            return rows
        return self._node("Mul", [rows, self._constant("embedding_scale", np.array(scale, self.dtype))], "scaled")

    def _attention(self, x: str, layer: str, index: int) -> str:
        config = self.config
        heads = {kind: self._linear(x, f"{layer}.self_attn.{kind}_proj") for kind in "qkv"}
        if config.qk_norm:  # as nodes: the operator's own Q/K-norm inputs exist on CUDA only (1.31)
            for kind in "qk":
                split = self._node("Reshape", [heads[kind], f"{kind}_heads_shape"], f"{layer}.{kind}_split")
                normed = self._norm(split, f"{layer}.self_attn.{kind}_norm.weight")
                heads[kind] = self._node("Reshape", [normed, f"{kind}_flat_shape"], f"{layer}.{kind}_normed")
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        layer_kind = config.layer_kinds[index]
        optional: dict[str, Any] = {}
        if layer_kind.window is not None:
            optional["local_window_size"] = layer_kind.window
        if config.query_scale is not None:
            optional["scale"] = config.query_scale
        if config.attention_softcap is not None:
            optional["softcap"] = config.attention_softcap
        rotary = self.rotary_tables.get(layer_kind.rope, ())
        attended = f"{layer}.attended"
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*heads.values(), *past, "seqlens_k", "total_sequence_length", *rotary],
                [attended, f"present.{index}.key", f"present.{index}.value"],
                name=attended,
                domain=MICROSOFT,
                num_heads=config.num_attention_heads,
                kv_num_heads=config.num_key_value_heads,
                do_rotary=int(layer_kind.rope is not None),
                rotary_interleaved=0,
                **optional,
            )
        )
        return self._linear(attended, f"{layer}.self_attn.o_proj")

    def _mlp(self, x: str, layer: str) -> str:
        gate = self._linear(x, f"{layer}.mlp.gate_proj")
        up = self._linear(x, f"{layer}.mlp.up_proj")
        if self.config.activation == "silu":
            # x * sigmoid(alpha * x): SiLU in one node.
            gate = self._node("QuickGelu", [gate], f"{layer}.mlp.silu", domain=MICROSOFT, alpha=1.0)
        else:
            gate = self._node("Gelu", [gate], f"{layer}.mlp.gelu", approximate="tanh")
        return self._linear(self._node("Mul", [gate, up], f"{layer}.mlp.gated"), f"{layer}.mlp.down_proj")

    def _logits(self, normed: str) -> None:
        flat = self._node("Reshape", [normed, "flat_shape"], "hidden_flat")
        rows = self._node("Gather", [flat, "logit_rows"], "hidden_rows")
        cap = self.config.logit_softcap
        if self.config.labels:  # a few rows: they keep their precision, and no cap is theirs
            weight, cap = self._to_compute(self._stored(HEAD)), None
            scored = self._node("FusedMatMul", [rows, weight], "score.out", domain=MICROSOFT, transB=1)
        else:
            scored = self._linear(rows, "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head")
        if self.element_type != TensorProto.FLOAT:
            scored = self._node("Cast", [scored], "logits" if cap is None else "logits_fp32", to=TensorProto.FLOAT)
        if cap is not None:
            size = self._constant("logit_softcap", np.array(cap, np.float32))
            bounded = self._node("Tanh", [self._node("Div", [scored, size], "logits_by_cap")], "logits_bounded")
            self._node("Mul", [bounded, size], "logits_capped")
        self.nodes[-1].output[0] = "logits"

    def _make_rotary_tables(self) -> None:
        """cos and sin [M, E/2] of every position that a slot can hold, for each kind of layer that turns."""
        head_dim = self.config.head_dim
        for rope in dict.fromkeys(kind.rope for kind in self.config.layer_kinds if kind.rope is not None):
            frequencies = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
            factors = rope.frequency_factors(head_dim)
            if factors is not None:
                frequencies = frequencies * factors
            angles = np.arange(self.capacity, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
            ending = f"_{len(self.rotary_tables)}" if self.rotary_tables else ""
            self.rotary_tables[rope] = (
                self._constant(f"cos_cache{ending}", np.cos(angles).astype(self.dtype)),
                self._constant(f"sin_cache{ending}", np.sin(angles).astype(self.dtype)),
            )

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _linear(self, x: str, name: str) -> str:
        """x @ W.T (+ b), W [out, in] as torch keeps it."""
        weight, output = f"{name}.weight", f"{name}.out"
        if self.precision in QUANTIZED:
            product = self._quantized(x, weight, output)
        else:
            inputs = [x, self._to_compute(self._stored(weight))]
            product = self._node("FusedMatMul", inputs, output, domain=MICROSOFT, transB=1)
        if self.lora and f"{name}.{LORA_A}" in self.shapes:
            product = self._node("Add", [product, self._adapted(x, name, self.lora.scale)], f"{name}.adapted")
        if name in self.adapted_by_row:
            product = self._node("Add", [product, self._adapted_by_row(x, name)], f"{name}.adapted")
        if f"{name}.bias" not in self.shapes:
            return product
        return self._node("Add", [product, self._to_compute(self._stored(f"{name}.bias"))], f"{name}.biased")

    def _adapted(self, x: str, name: str, scale: float) -> str:
        """x @ A.T @ B.T * scale"""
        a, b = (self._to_compute(self._stored(f"{name}.{kind}")) for kind in (LORA_A, LORA_B))
        down = self._node("FusedMatMul", [x, a], f"{name}.lora_A.out", domain=MICROSOFT, transB=1, alpha=scale)
        return self._node("FusedMatMul", [down, b], f"{name}.lora_B.out", domain=MICROSOFT, transB=1)

    def _adapted_by_row(self, x: str, name: str) -> str:
        """x @ A.T @ B, where of all adapters' ranks those of the row's own adapter are kept."""
        a, b = row_adapter_inputs(name)
        down = self._node("FusedMatMul", [x, a], f"{name}.lora_A.out", domain=MICROSOFT, transB=1)
        own = self._node("Mul", [down, ADAPTER_RANKS], f"{name}.lora_A.own")
        return self._node("MatMul", [own, b], f"{name}.lora_B.out")

    def _quantized(self, x: str, weight: str, output: str) -> str:
        out_features, in_features = self.shapes[weight]
        stored, form = self._blocks(weight)
        return self._node(
            "MatMulNBits",
            [x, *stored],
            output,
            domain=MICROSOFT,
            K=in_features,
            N=out_features,
            accuracy_level=4,  # int8 activations inside the kernel; level 0 is 50 times slower on CPU (1.31)
            **form,
        )

    def _quantized_rows(self, weight: str) -> str:
        """The tokens' rows of a table whose blocks are those that the output projection reads where they are tied."""
        (values, scales), form = self._blocks(weight)  # eight bits, without zero points
        # Scales have the rank of the values here, and one less in MatMulNBits (1.31).
        last = self._constant("last_axis", np.array([-1], np.int64))
        inputs = [values, "input_ids", self._node("Unsqueeze", [scales, last], f"{scales}.unsqueezed")]
        rows = self._node(
            "GatherBlockQuantized", inputs, "embedded_blocks", domain=MICROSOFT, gather_axis=0, quantize_axis=2, **form
        )
        rows = self._node("Reshape", [rows, self._constant("rows_shape", np.array([0, 0, -1], np.int64))], "embedded")
        width = self.config.hidden_size
        if width % form["block_size"] == 0:
            return rows
        ends = [self._constant(f"width_{end}", np.array([end], np.int64)) for end in (0, width)]
        return self._node("Slice", [rows, *ends, last], "embedded_width")

    def _blocks(self, weight: str) -> tuple[list[str], dict[str, int]]:
        """Initializers and attributes of a quantised weight, made once whatever number of nodes read it."""
        if weight not in self.blocks:
            assert self.tensors is not None
            four = self.precision == "int4" and takes_four_bits(weight)
            quantize = quantize_four_bit_blocks if four else quantize_blocks
            made = quantize(np.asarray(self.tensors[weight], np.float32))
            parts = {f"int{made.bits}": made.values, "scales": made.scales, "zero_points": made.zero_points}
            stored = [self._constant(f"{weight}.{part}", array) for part, array in parts.items() if array is not None]
            self.blocks[weight] = stored, {"bits": made.bits, "block_size": made.block_size}
        return self.blocks[weight]

    def _norm(self, x: str, weight: str) -> str:
        scale = self._norm_weight(weight)
        return self._node(
            "SimplifiedLayerNormalization",
            [x, scale],
            f"{weight}.normed",
            axis=-1,
            epsilon=self.config.rms_norm_eps,
            stash_type=1,
        )

    def _add_norm(self, x: str, residual: str, weight: str) -> tuple[str, str]:
        """Returns norm(x + residual) and x + residual."""
        scale = self._norm_weight(weight)
        normed, summed = f"{weight}.normed", f"{weight}.residual"
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, residual, scale],
                [normed, "", "", summed],
                name=normed,
                domain=MICROSOFT,
                epsilon=self.config.rms_norm_eps,
            )
        )
        return normed, summed

    def _norm_weight(self, name: str) -> str:
        """What the norm multiplies by: the weight, or 1 + the weight, added in float32 where that can be."""
        if not self.config.norm_plus_one:
            return self._to_compute(self._stored(name))
        if self.tensors is not None:
            return self._constant(
                f"{name}.plus_one", (1 + np.asarray(self.tensors[name], np.float32)).astype(self.dtype)
            )
        one = self._constant("one", np.array(1, self.dtype))
        return self._node("Add", [self._to_compute(self._stored(name)), one], f"{name}.plus_one")

    def _model(self) -> ModelProto:
        config = self.config
        cache_shape: list[str | int | None] = ["B", config.num_key_value_heads, "M", config.head_dim]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "L"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("logit_rows", TensorProto.INT64, ["N"]),
        ]
        if self.row_adapters:
            inputs.append(helper.make_tensor_value_info(ADAPTER_RANKS, self.element_type, ["B", 1, "R"]))
        for layer, (out, into) in self.adapted_by_row.items():
            for name, width in zip(row_adapter_inputs(layer), (into, out), strict=True):
                inputs.append(helper.make_tensor_value_info(name, self.element_type, ["R", width]))
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", config.num_outputs])]
        for index in range(config.num_hidden_layers):
            for kind in ("key", "value"):
                past, present = f"past_key_values.{index}.{kind}", f"present.{index}.{kind}"
                inputs.append(helper.make_tensor_value_info(past, self.element_type, cache_shape))
                outputs.append(helper.make_tensor_value_info(present, self.element_type, cache_shape))
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="twinloop")
