"""The tensors of a network: one table, which the ONNX graph, memory planning, counting and the optimizer read.

Letters in tensor names and comments, one meaning each in the whole repository:

    B rows of a batch        L positions of a row      D width of the network    F width of the MLP
    H query heads            K key-value heads         E width of a head         V size of the vocabulary
    N scored tokens          S sequences               P preference pairs        T tokens of an answer
    C slots of the cache     M positions of a slot     G matrices of one shape   I, J their sides, I <= J
    R ranks of adapters
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinloop.models.config import DecoderConfig


HEAD = "score.weight"
"""The head of a classifier or a reward model, as `transformers` names it."""


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint: Hugging Face's name, torch's shape."""
    D, F, E, V = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
    queries, keys = config.num_attention_heads * E, config.num_key_value_heads * E
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (width, D)
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (width,)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (E,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (E,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (D, queries)
        if config.attention_output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (D,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        if config.post_norms:
            shapes[f"{layer}.pre_feedforward_layernorm.weight"] = (D,)
            shapes[f"{layer}.post_feedforward_layernorm.weight"] = (D,)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
            if config.mlp_bias:
                shapes[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (D,)
    if config.labels:
        shapes[HEAD] = (len(config.labels), D)
    elif not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def is_hidden_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix inside the layers: those that Muon updates and that are quantised. A factor of an
    adapter is none: what Muon would orthogonalise is their product."""
    return len(shape) == 2 and name != HEAD and not any(part in name for part in ("embed_tokens", "lm_head", "lora_"))


def hidden_matrices(config: DecoderConfig) -> list[tuple[int, int]]:
    """(rows, columns) of every matrix inside the layers, as torch keeps it."""
    shapes = weight_shapes(config).items()
    return [(shape[0], shape[1]) for name, shape in shapes if is_hidden_matrix(name, shape)]
