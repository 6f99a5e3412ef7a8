"""SmolLM3: a Llama in which every fourth layer does not look at positions (Bakouche et al., 2025; layers without
rotary positions: Yang et al., 2025, "Rope to Nope and Back Again")."""

from __future__ import annotations

from typing import Any

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.config_fields import Fields, by_layer, count, flag, read_rope, read_windows, write_windows
from twinloop.models.gguf_form import GGUFForm, differs_or_llama3

ARCHITECTURE = "SmolLM3ForCausalLM"
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
    "no_rope_layer_interval": 4,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
}


def _unsupported(config: DecoderConfig) -> str | None:
    if config.rotary_layers != tuple((index + 1) % 4 != 0 for index in range(config.num_hidden_layers)):
        return "llama.cpp knows a smollm3 only with every fourth layer without rotary positions"
    return differs_or_llama3(config)


GGUF = GGUFForm("smollm3", permuted=True, unsupported=_unsupported)


def read(fields: Fields, plain: DecoderConfig) -> dict[str, Any]:
    """`attention_bias` gives all four projections one. `no_rope_layers` says 1 where a layer does turn."""
    layers = plain.num_hidden_layers
    turns = by_layer(fields, "no_rope_layers", (0, 1), layers)
    if turns is None:
        interval = count(fields, "no_rope_layer_interval", 4)
        if interval == 0:
            raise UserError("config.json: no_rope_layer_interval: 0 is not a number of layers")
        turns = [int((index + 1) % interval != 0) for index in range(layers)]
    rotary = tuple(bool(turn) for turn in turns)
    windowed = flag(fields, "use_sliding_window") and fields.get("sliding_window") is not None
    return {
        "attention_output_bias": plain.attention_bias,
        "mlp_bias": flag(fields, "mlp_bias"),
        "rotary_layers": rotary,
        **read_rope(fields, plain),
        **read_windows(fields, plain, slides=[windowed and not turn for turn in rotary]),
    }


def write(config: DecoderConfig, fields: dict[str, Any]) -> dict[str, Any]:
    windows = {"use_sliding_window": True, **write_windows(config)} if config.windows else {}
    turns = config.rotary_layers or (True,) * config.num_hidden_layers
    return {**fields, "mlp_bias": config.mlp_bias, "no_rope_layers": [int(turn) for turn in turns], **windows}
