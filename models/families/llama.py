"""Llama 2 and 3, SmolLM2, and many of their shape (Touvron et al., 2023; Grattafiori et al., 2024)."""

from __future__ import annotations

from typing import Any

from twinloop.models.config import DecoderConfig
from twinloop.models.config_fields import Fields, flag, read_rope
from twinloop.models.gguf_form import GGUFForm

ARCHITECTURE = "LlamaForCausalLM"
DEFAULTS = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
GGUF = GGUFForm("llama", permuted=True)


def read(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    """`attention_bias` gives all four projections one."""
    return {
        "attention_output_bias": plain.attention_bias,
        "mlp_bias": flag(fields, "mlp_bias"),
        **read_rope(fields, plain),
    }


def write(config: DecoderConfig, fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "mlp_bias": True} if config.mlp_bias else fields
