"""Qwen2 and Qwen2.5: biases on queries, keys and values, and windows on the upper layers where they are switched on
(Yang et al., 2024)."""

from __future__ import annotations

from typing import Any

from twinloop.models.config import DecoderConfig
from twinloop.models.config_fields import Fields, read_rope, read_upper_windows, write_windows
from twinloop.models.gguf_form import GGUFForm, differs_or_llama3

ARCHITECTURE = "Qwen2ForCausalLM"
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GGUF = GGUFForm("qwen2", unsupported=differs_or_llama3)


def read(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": True, **read_rope(fields, plain), **read_upper_windows(fields, plain)}


def write(config: DecoderConfig, fields: dict[str, Any]) -> dict[str, Any]:
    del fields["attention_bias"]
    return {**fields, "use_sliding_window": True, **write_windows(config)} if config.windows else fields
