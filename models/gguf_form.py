"""How a family's tensors lie in a GGUF file: llama.cpp's name of each, and what it changes of the values.

A family's module holds its `GGUFForm`; whoever reads or writes a GGUF file asks it for `tensors(config)`. The names are
those of the `gguf` package, as a test compares; it is not imported here, since the server imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.shapes import weight_shapes

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
class GGUFTensor:
    """One tensor of a file. shape: ours, as torch has it; GGUF states it backwards."""

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
    refusal: why llama.cpp would compute something else for a network, if it would.
    """

    architecture: str
    permuted: bool = False
    layer_names: Mapping[str, str] = field(default_factory=dict)
    refusal: Callable[[DecoderConfig], str | None] = differs

    def tensors(self, config: DecoderConfig) -> dict[str, GGUFTensor]:
        """Every tensor of a checkpoint, by Hugging Face's name. Raises UserError for a network that it cannot hold."""
        if reason := self.refusal(config):
            raise UserError(f"gguf: {reason}; export the model as a Hugging Face directory")
        names = _LAYER | dict(self.layer_names)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if self.permuted else {}
        tensors = {}
        for name, shape in weight_shapes(config).items():
            module, _, kind = name.rpartition(".")
            theirs = _NETWORK.get(module)
            if theirs is None:
                _, _, index, part = module.split(".", 3)
                theirs = f"blk.{index}.{names[part]}"
            tensors[name] = GGUFTensor(
                name=f"{theirs}.{kind}",
                shape=shape,
                heads=heads.get(module.rpartition(".")[2]),
                plus_one=config.norm_plus_one and module.endswith("norm"),
            )
        return tensors
