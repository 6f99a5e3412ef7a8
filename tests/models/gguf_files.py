"""Small GGUF files, written by the package `gguf` from a random network, as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np

from twinloop.models.config import DecoderConfig
from twinloop.models.new_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer
from twinloop.models.shapes import weight_shapes
from twinloop.models.tokenizer import ChatTokenizer

TOKENIZER = train_tokenizer(["the order of the other customer, the other order"] * 4, 270)
SIZES = {
    "vocab_size": 272,  # more rows than the tokenizer has tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}}
PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def config_of(family: str, **sizes: Any) -> DecoderConfig:
    return DecoderConfig(**(SIZES | FAMILIES[family] | sizes))


def random_weights(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Norms and biases away from ones and zeros, where a forgotten one would not show."""
    random = np.random.default_rng(seed)
    return {
        name: ((0.5 if len(shape) == 1 else 0.2) * random.standard_normal(shape) + ("norm" in name)).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{PARTS[parts[-2]]}.{parts[-1]}"
    return f"{PARTS['.'.join(parts[:-1])]}.{parts[-1]}"


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """As convert_hf_to_gguf.py does it to a Llama's queries and keys."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def vocabulary(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Its metadata, and what it ends chats with."""
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        model = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]
    names = {id: token for token, id in model["vocab"].items()}
    tokens = [names[id] for id in range(len(names))]

    merges = [" ".join(pair) for pair in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.stop_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_gguf(
    path: Path,
    family: str,
    config: DecoderConfig,
    weights: dict[str, np.ndarray],
    *,
    type: str = "F32",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, tuple[np.ndarray, str] | None] | None = None,
) -> Path:
    """type: of the matrices; the rest is F32. metadata, tensors: what differs, by key and by the file's own names;
    None leaves it out."""
    writer = gguf.GGUFWriter(path, (metadata or {}).get("general.architecture", family))
    fields = {
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.vocab_size": config.vocab_size,
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.key_length": config.head_dim,
        f"{family}.attention.value_length": config.head_dim,
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{family}.rope.freq_base": config.rope_theta,
        f"{family}.rope.dimension_count": config.head_dim,
        "general.license": "mit",
        **vocabulary(TOKENIZER),
        **(metadata or {}),
    }
    for key, value in fields.items():
        if key != "general.architecture" and value is not None:
            _add(writer, key, value)
    stored: dict[str, tuple[np.ndarray, str] | None] = {}
    for name, array in weights.items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permute(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stored[gguf_name(name)] = (array, type if array.ndim == 2 else "F32")
    for name, tensor in (stored | (tensors or {})).items():
        if tensor is not None:
            kind = gguf.GGMLQuantizationType[tensor[1]]
            raw = tensor[0] if tensor[0].dtype == np.uint8 else gguf.quants.quantize(tensor[0], kind)
            writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
