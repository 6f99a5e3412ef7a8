"""Gemma 2, as somebody would add it: half of the layers with a window, attention scores and logits capped."""

from __future__ import annotations

from typing import Any

from twinloop.models.config import DecoderConfig
from twinloop.models.config_fields import Fields, number, read_rope, read_windows, write_windows
from twinloop.models.gguf_form import GGUFForm

ARCHITECTURE = "Gemma2ForCausalLM"
DEFAULTS = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256}
GGUF = GGUFForm("gemma2")


def read(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    return {
        "norm_plus_one": True,
        "post_norms": True,
        "embedding_scale": plain.hidden_size**0.5,
        "query_scale": fields["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": number(fields, "attn_logit_softcapping"),
        "logit_softcap": number(fields, "final_logit_softcapping"),
        **read_rope(fields, plain),
        **read_windows(fields, plain, slides=[index % 2 == 0 for index in range(plain.num_hidden_layers)]),
    }


def write(config: DecoderConfig, fields: dict[str, Any]) -> dict[str, Any]:
    assert config.query_scale is not None
    return {
        **fields,
        "hidden_activation": fields["hidden_act"],
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        **write_windows(config),
    }
