"""Random small networks of each family, as `transformers` builds them."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

POSITIONS = 96
VOCABULARY = 96


def random_config(family: str, seed: int) -> PreTrainedConfig:
    rng = np.random.default_rng([seed, *family.encode()])
    kv_heads = int(rng.integers(1, 3))
    layers = int(rng.integers(2, 5))
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": int(rng.integers(3, 7)) * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * int(rng.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": int(rng.choice([16, 32])),
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    biases = {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}
    window = int(rng.integers(3, 14))
    rope = _rope(rng, theta=float(rng.choice([500.0, 10_000.0])))
    if family == "llama":
        return transformers.LlamaConfig(**sizes, **biases, rope_parameters=rope)
    if family == "mistral":
        window_or_none = window if rng.random() < 0.8 else None
        return transformers.MistralConfig(**sizes, rope_parameters=rope, sliding_window=window_or_none)
    if family in ("qwen2", "qwen3"):
        kind = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[family]
        first = int(rng.integers(0, layers))
        windowed = {
            "use_sliding_window": bool(rng.random() < 0.7),
            "sliding_window": window,
            "max_window_layers": first,
        }
        if windowed["use_sliding_window"] and rng.integers(2):
            windowed["layer_types"] = _layer_types(rng, layers)
        bias = {"attention_bias": biases["attention_bias"]} if family == "qwen3" else {}
        return kind(**sizes, **bias, **windowed, rope_parameters=rope)
    if family == "smollm3":
        turns = {"no_rope_layers": rng.integers(0, 2, layers).tolist()} if rng.integers(2) else {}
        windowed = {"use_sliding_window": True, "sliding_window": window} if rng.integers(2) else {}
        interval = {"no_rope_layer_interval": int(rng.integers(2, 4))}
        return transformers.SmolLM3Config(**sizes, **biases, **turns, **windowed, **interval, rope_parameters=rope)
    if family == "gemma3_text":
        scaling = [{}, {"final_logit_softcapping": 3.0}][int(rng.integers(2))]
        angles = {"full_attention": rope, "sliding_attention": _rope(rng, theta=100.0)}
        return transformers.Gemma3TextConfig(
            **sizes,
            **scaling,
            attention_bias=biases["attention_bias"],
            query_pre_attn_scalar=int(rng.integers(8, 40)),
            sliding_window=window,
            layer_types=_layer_types(rng, layers),
            rope_parameters=angles,
        )
    raise AssertionError(family)


def _rope(rng: np.random.Generator, theta: float) -> dict[str, object]:
    kind = str(rng.choice(["default", "linear", "llama3"]))
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        rope["factor"] = float(rng.choice([2.0, 8.0]))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    return rope


def _layer_types(rng: np.random.Generator, layers: int) -> list[str]:
    """Some of both kinds, the first one with a window."""
    kinds = ["sliding_attention", "full_attention"]
    return [kinds[0], *(kinds[int(kind)] for kind in rng.integers(0, 2, layers - 1))]


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Weights so large that each position, norm and bias shows in the logits."""
    torch.manual_seed(seed)
    # Eager attention: the others leave out soft-capping.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                scale = 1.0 if "embed" in name or "lm_head" in name else 1.5
                parameter.copy_(scale * torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model
