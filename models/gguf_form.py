"""How a family's network lies in a GGUF file: llama.cpp's names of sizes and tensors, and what it changes of values.

A family's module holds its `GGUFForm`, and whoever reads or writes a GGUF file goes by that. The names are those of the
`gguf` package, as a test compares; it is not imported here, since the server imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.shapes import weight_shapes

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""Keys of the metadata, without the architecture before them, and the fields that are called alike in config.json."""

ROPE_FREQS = "rope_freqs.weight"
"""The tensor that holds Llama 3's rotary scaling: what each frequency is divided by."""

_NETWORK = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class GGUFLayout:
    """How one tensor lies in a file. shape: ours, as torch has it; GGUF states it backwards."""

    name: str
    shape: tuple[int, ...]
    heads: int | None = None
    """Of how many heads the rows are reordered, so that the two values that one angle turns lie side by side."""
    plus_one: bool = False
    """Whether the file holds 1 + the value."""

    def to_gguf(self, values: np.ndarray) -> np.ndarray:
        if self.heads is not None:
            halves = values.reshape(self.heads, 2, -1, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        return values + 1 if self.plus_one else values

    def from_gguf(self, values: np.ndarray) -> np.ndarray:
        if self.heads is not None:
            pairs = values.reshape(self.heads, -1, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values - 1 if self.plus_one else values


def differs(config: DecoderConfig) -> str | None:
    """Why llama.cpp's code for a plain architecture would compute something else for this network, if it would."""
    if any(kind.window is not None for kind in config.layer_kinds):
        return f"llama.cpp has no sliding windows for {config.model_type}"
    if config.activation != "silu":
        return f"llama.cpp has no {config.activation} for {config.model_type}"
    return None


def differs_or_llama3(config: DecoderConfig) -> str | None:
    """As `differs`, of the architectures that ignore the factors of Llama 3's rotary scaling."""
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        return f"llama.cpp has no llama3 rotary scaling for {config.model_type}"
    return differs(config)


@dataclass(frozen=True)
class GGUFForm:
    """How one architecture lies in a file.

    architecture: llama.cpp's name. permuted: whether llama.cpp turns neighbouring values, not halves, so that the rows
    of queries and keys are in another order. layer_names: what differs from the usual names of a layer's tensors.
    own_metadata: of a network, beside the usual sizes; own_fields: the fields of config.json that the metadata tell
    beside them. unsupported: why llama.cpp would compute something else for a network, if it would.
    """

    architecture: str
    permuted: bool = False
    layer_names: Mapping[str, str] = field(default_factory=dict)
    own_metadata: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    own_fields: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda metadata: {}
    unsupported: Callable[[DecoderConfig], str | None] = differs

    def metadata(self, config: DecoderConfig) -> dict[str, Any]:
        """The network's numbers by key, without the architecture before it.

        Raises UserError for a network that llama.cpp does not have.
        """
        self._check(config)
        metadata = {key: getattr(config, name) for key, name in _SIZES.items()}
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
        return metadata | self.own_metadata(config)

    def fields(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of config.json that metadata tell, by keys as `metadata` gives them. Llama 3's rotary scaling is
        not among them: see `rope_freqs`."""
        fields = {name: metadata[key] for key, name in _SIZES.items() if key in metadata}
        kind = metadata.get("rope.scaling.type", "none")
        if kind != "none":
            fields["rope_scaling"] = {"rope_type": kind, "factor": metadata.get("rope.scaling.factor")}
        return fields | self.own_fields(metadata)

    def rope_freqs(self, config: DecoderConfig) -> np.ndarray | None:
        """The tensor `ROPE_FREQS` [E/2], float32, where the network has Llama 3's rotary scaling."""
        if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
            return None
        factors = config.rope.frequency_factors(config.head_dim)
        assert factors is not None
        return 1 / factors

    def tensors(self, config: DecoderConfig) -> dict[str, GGUFLayout]:
        """Every tensor of a checkpoint, by Hugging Face's name.

        Raises UserError for a network that llama.cpp does not have.
        """
        self._check(config)
        names = _LAYER | dict(self.layer_names)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if self.permuted else {}
        tensors = {}
        for name, shape in weight_shapes(config).items():
            module, _, kind = name.rpartition(".")
            theirs = _NETWORK.get(module)
            if theirs is None:
                _, _, index, part = module.split(".", 3)
                theirs = f"blk.{index}.{names[part]}"
            tensors[name] = GGUFLayout(
                name=f"{theirs}.{kind}",
                shape=shape,
                heads=heads.get(module.rpartition(".")[2]),
                plus_one=config.norm_plus_one and module.endswith("norm"),
            )
        return tensors

    def _check(self, config: DecoderConfig) -> None:
        if reason := self.unsupported(config):
            raise UserError(f"gguf: {reason}; export the model as a Hugging Face directory")
