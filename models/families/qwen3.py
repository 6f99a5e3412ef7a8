"""Qwen3: queries and keys are normed, and the width of a head is its own (Yang et al., 2025)."""

from __future__ import annotations

from typing import Any

from twinloop.models.config import DecoderConfig
from twinloop.models.config_fields import Fields, read_rope, read_upper_windows, write_windows
from twinloop.models.gguf_form import GGUFForm, differs_or_llama3

ARCHITECTURE = "Qwen3ForCausalLM"
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _gguf_unsupported(config: DecoderConfig) -> str | None:
    return "llama.cpp has no biases in a qwen3" if config.attention_bias else differs_or_llama3(config)


GGUF = GGUFForm("qwen3", unsupported=_gguf_unsupported)


def read(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    """`attention_bias` gives all four projections one."""
    return {
        "qk_norm": True,
        "attention_output_bias": plain.attention_bias,
        **read_rope(fields, plain),
        **read_upper_windows(fields, plain),
    }


def write(config: DecoderConfig, fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "use_sliding_window": True, **write_windows(config)} if config.windows else fields
