"""Gemma 3, the text model: norms of 1 + w before and after each sublayer, normed queries and keys, a scaled embedding,
and five layers with a window and angles of their own to each that sees all (Gemma Team, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.config_fields import (
    Fields,
    count,
    flag,
    number,
    parse_rope,
    read_windows,
    write_rope,
    write_windows,
)
from twinloop.models.gguf_form import GGUFForm
from twinloop.models.rope import Rope

ARCHITECTURE = "Gemma3ForCausalLM"
CLASSIFIER = "Gemma3TextForSequenceClassification"
_LOCAL_THETA = 10000.0
DEFAULTS = {
    "vocab_size": 262208,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": _LOCAL_THETA,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _gguf_scalar(layers: int | None, head_dim: int | None) -> int | None:
    """llama.cpp's `query_pre_attn_scalar`: it knows the 27B by its 62 layers (5376 / 32 heads)."""
    return 168 if layers == 62 else head_dim


def _gguf_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    scalar = _gguf_scalar(metadata.get("block_count"), metadata.get("attention.key_length"))
    return {"sliding_window": metadata.get("attention.sliding_window"), "query_pre_attn_scalar": scalar}


def _gguf_unsupported(config: DecoderConfig) -> str | None:
    """llama.cpp fixes in its code what a config.json may vary."""
    if [window is not None for window in config.windows] != _sliding(config.num_hidden_layers, 6):
        return "llama.cpp knows a gemma3 only with every sixth layer without a window"
    if config.window_rope != Rope(theta=_LOCAL_THETA):
        return f"llama.cpp turns the windowed layers of a gemma3 only by the base {_LOCAL_THETA:g}"
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        return "llama.cpp has no llama3 rotary scaling for gemma3"
    scalar = _gguf_scalar(config.num_hidden_layers, config.head_dim)
    if scalar is None or config.query_scale != scalar**-0.5:
        return "llama.cpp scales the queries of a gemma3 only by their head's width"
    if config.logit_softcap is not None or config.attention_bias or config.activation != "gelu_tanh":
        return "llama.cpp knows a gemma3 only without soft-capping and biases, and with gelu_pytorch_tanh"
    return None


GGUF = GGUFForm(
    "gemma3",
    layer_names={
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    own_metadata=lambda config: {"attention.sliding_window": next(window for window in config.windows if window)},
    own_fields=_gguf_fields,
    unsupported=_gguf_unsupported,
)


def read(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    """`attention_bias` gives all four projections one."""
    if flag(fields, "use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention: the network attends to earlier tokens only")
    if fields.get("attn_logit_softcapping") is not None:
        # transformers (5.23) and llama.cpp have the field, and do not look at it.
        raise UserError("config.json: attn_logit_softcapping is applied by no implementation of gemma3; remove it")
    pattern = count(fields, "sliding_window_pattern", 6)
    if pattern == 0:
        raise UserError("config.json: sliding_window_pattern: 0 is not a number of layers")
    kinds = _rope_kinds(fields)
    full = parse_rope(kinds["full_attention"], fields, plain)
    local = {**fields, "rope_theta": fields["rope_local_base_freq"]}
    scalar = number(fields, "query_pre_attn_scalar")
    assert scalar is not None, "it has a default"
    return {
        "attention_output_bias": plain.attention_bias,
        "qk_norm": True,
        "norm_plus_one": True,
        "post_norms": True,
        "embedding_scale": plain.hidden_size**0.5,
        "query_scale": scalar**-0.5,
        "logit_softcap": number(fields, "final_logit_softcapping"),
        "rope_theta": full.theta,
        "rope_scaling": full.scaling,
        "window_rope": parse_rope(kinds["sliding_attention"], local, plain),
        **read_windows(fields, plain, slides=_sliding(plain.num_hidden_layers, pattern)),
    }


def write(config: DecoderConfig, fields: dict[str, Any]) -> dict[str, Any]:
    activation = fields.pop("hidden_act")
    assert config.query_scale is not None
    local = config.window_rope or config.rope
    return {
        **fields,
        "hidden_activation": activation,
        "query_pre_attn_scalar": _whole(config.query_scale**-2),
        "final_logit_softcapping": config.logit_softcap,
        "rope_parameters": {
            "full_attention": fields["rope_parameters"],
            "sliding_attention": write_rope(local),
        },
        "rope_local_base_freq": local.theta,
        **write_windows(config),
    }


def _sliding(layers: int, pattern: int) -> list[bool]:
    return [(index + 1) % pattern != 0 for index in range(layers)]


def _rope_kinds(fields: Fields) -> dict[str, Any]:
    """The angles by kind of layer; `rope_scaling`, of before transformers 5, is of the layers that see all."""
    given = {} if fields.get("rope_parameters") is None else fields["rope_parameters"]
    if not isinstance(given, dict):
        raise UserError(f"config.json: rope_parameters: {given!r} is not an object")
    full, scaling = given.get("full_attention") or {}, fields.get("rope_scaling") or {}
    if isinstance(full, dict):
        full = full | scaling if isinstance(scaling, dict) else scaling
    return {"full_attention": full, "sliding_attention": given.get("sliding_attention") or {}}


def _whole(value: float) -> int | float:
    """transformers wants a whole number."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value
