"""Mistral: a Llama whose every layer may have a sliding window (Jiang et al., 2023)."""

from __future__ import annotations

from typing import Any

from twinloop.models.config import DecoderConfig
from twinloop.models.config_fields import Fields, read_rope, read_windows
from twinloop.models.gguf_form import GGUFForm

ARCHITECTURE = "MistralForCausalLM"
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GGUF = GGUFForm("llama", permuted=True)


def read(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    """There are no biases, whatever `attention_bias` says; a window of null is none."""
    slides = [fields["sliding_window"] is not None] * plain.num_hidden_layers
    windows = read_windows({**fields, "layer_types": None}, plain, slides=slides)
    return {"attention_bias": False, **read_rope(fields, plain), **windows}


def write(config: DecoderConfig, fields: dict[str, Any]) -> dict[str, Any]:
    del fields["attention_bias"]
    return {**fields, "sliding_window": config.windows[0] if config.windows else None}
