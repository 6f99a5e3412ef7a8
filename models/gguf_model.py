"""What a GGUF file calls the sizes and the tensors of a network, in Hugging Face's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.gguf_file import GGUFFile
from twinloop.models.shapes import weight_shapes

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""`general.architecture`; each is also Hugging Face's model_type. Mistral's files say llama."""
PERMUTED = ("llama",)
"""Architectures whose queries and keys llama.cpp rotates in neighbouring pairs, so that their rows are permuted."""

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
_IN_A_LAYER = {
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
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NO_WEIGHTS = ("rope_freqs.weight",)
LLAMA3_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_FACTORS = (8.0, 32.0)
"""Of Llama 3.1 and 3.3, and of Llama 3.2."""


def read_network(file: GGUFFile) -> DecoderConfig:
    """The network's shape. Raises UserError for another architecture, or where a size is missing."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{file.path}: architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    fields: dict[str, Any] = {"model_type": architecture, "tie_word_embeddings": "output.weight" not in file.tensors}
    for key, name in _SIZES.items():
        value = file.metadata.get(f"{architecture}.{key}")
        if value is not None:
            fields[name] = value
        elif key not in _OPTIONAL:
            raise UserError(
                f"{file.path}: no {architecture}.{key} in its metadata; it is no language model of this kind"
            )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: token_embd.weight is missing; it is no whole language model")
    fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    fields |= _scaling(file, architecture) | _special_ids(file.metadata)
    try:
        return DecoderConfig.from_huggingface(fields)
    except UserError as error:  # it names the fields as config.json does
        raise UserError(
            f"{file.path}: its metadata, {str(error).replace('config.json: ', 'as config.json: ', 1)}"
        ) from None


def _scaling(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """`rope_scaling` as config.json has it: by its name in the metadata, or Llama 3's, of which only factors remain."""
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind != "none":
        factor = file.metadata.get(f"{architecture}.rope.scaling.factor")
        return {"rope_scaling": {"rope_type": kind, "factor": factor}}
    if "rope_freqs.weight" not in file.tensors:
        return {}
    factors_F, theta = file.load("rope_freqs.weight"), file.metadata.get(f"{architecture}.rope.freq_base", 10000.0)
    for factor in LLAMA3_FACTORS:
        if np.allclose(factors_F, _llama3_factors(len(factors_F), theta, factor), rtol=1e-4):
            return {"rope_scaling": {**LLAMA3_SCALING, "factor": factor}}
    raise UserError(
        f"{file.path}: rope_freqs.weight is not the rotary scaling of Llama 3.1, 3.2 or 3.3; only that is read"
    )


def _llama3_factors(count: int, theta: float, factor: float) -> np.ndarray:
    """By how much each frequency is divided (Llama 3.1; as llama.cpp's converter writes it)."""
    low, high = LLAMA3_SCALING["low_freq_factor"], LLAMA3_SCALING["high_freq_factor"]
    turns = LLAMA3_SCALING["original_max_position_embeddings"] * theta ** (-np.arange(count) / count) / (2 * np.pi)
    smooth = ((turns - low) / (high - low)).clip(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: id for name, id in found.items() if id is not None}


def gguf_names(config: DecoderConfig) -> dict[str, str]:
    """Hugging Face's name of each tensor, by its name in a GGUF file."""
    return {_gguf_name(name): name for name in weight_shapes(config)}


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    _, _, index, inside = module.split(".", 3)
    return f"blk.{index}.{_IN_A_LAYER[inside]}.{kind}"


def network_shapes(file: GGUFFile, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by Hugging Face's names; one that the network does not have goes by its own."""
    names = gguf_names(config)
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in _NO_WEIGHTS}
    return {names.get(name, name): tensor.shape for name, tensor in tensors.items()}


def load_network(file: GGUFFile, config: DecoderConfig) -> dict[str, np.ndarray]:
    """All weights as float32, by Hugging Face's names."""
    permuted = file.metadata["general.architecture"] in PERMUTED
    tensors = {}
    for source, name in gguf_names(config).items():
        array = file.load(source)
        if permuted and ".q_proj." in name:
            array = unpermute(array, config.num_attention_heads)
        elif permuted and ".k_proj." in name:
            array = unpermute(array, config.num_key_value_heads)
        tensors[name] = array
    return tensors


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys [heads * E, ...], from neighbouring pairs (llama.cpp) to halves (Hugging Face)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
