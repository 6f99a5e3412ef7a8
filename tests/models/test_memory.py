"""What `plan` promises is what the formats really take."""

import math

import numpy as np
import pytest

from twinloop.common.errors import UserError
from twinloop.models.adapter_form import AdapterForm
from twinloop.models.config import DecoderConfig
from twinloop.models.memory import flops_per_token, serving_memory, training_memory
from twinloop.models.onnx_graph import build_graph
from twinloop.models.shapes import weight_shapes

TINY = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LLAMA_8B = DecoderConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip

GEMMA = DecoderConfig(
    **TINY, qk_norm=True, post_norms=True, norm_plus_one=True, activation="gelu_tanh", windows=(9, None, 9),
    embedding_scale=9.8, query_scale=0.2, logit_softcap=30.0,
)  # fmt: skip


def variants() -> list[DecoderConfig]:
    return [
        DecoderConfig(**TINY),
        DecoderConfig(**TINY, tie_word_embeddings=False),
        DecoderConfig(**TINY, attention_bias=True),
        DecoderConfig(**TINY, qk_norm=True),
        DecoderConfig(**TINY, attention_bias=True, attention_output_bias=True, mlp_bias=True),
        GEMMA,
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("config", variants(), ids=["tied", "untied", "bias", "qk-norm", "biases", "gemma"])
def test_weights_and_scales_are_those_of_the_exported_graph(config: DecoderConfig, precision: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weight_shapes(config).items()}
    graph = build_graph(config, tensors, precision=precision, capacity=64).graph
    sizes = {tensor.name: len(tensor.raw_data) for tensor in graph.initializer}
    weights = sum(size for name, size in sizes.items() if name.startswith(("model.", "lm_head")))
    scales = sum(size for name, size in sizes.items() if name.endswith((".scales", ".zero_points")))
    plan = serving_memory(config, precision=precision, slots=1, max_length=64)
    assert plan.scales_bytes == scales
    assert plan.weights_bytes == weights - scales


def test_optimizer_state_is_what_the_optimizers_keep() -> None:
    config = DecoderConfig(**TINY)
    shapes = weight_shapes(config)
    hidden = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name)
    plan = training_memory(config, micro_batch_tokens=512)
    assert plan.optimizer_bytes == 4 * hidden + 8 * (config.num_parameters - hidden)
    assert plan.weights_bytes == plan.gradients_bytes == 4 * config.num_parameters
    adamw = training_memory(config, micro_batch_tokens=512, optimizer="adamw")
    assert adamw.optimizer_bytes == 8 * config.num_parameters
    assert plan.reference_bytes == 0
    assert training_memory(config, micro_batch_tokens=512, reference=True).reference_bytes == plan.weights_bytes
    judged = training_memory(config, micro_batch_tokens=512, reward_models=[config, config])
    assert judged.total_bytes - plan.total_bytes == judged.reward_models_bytes == 2 * plan.weights_bytes
    assert plan.total_bytes == sum(size for name, size in plan.rows() if name != "total")


def test_an_adapter_has_gradients_and_moments_of_its_own_and_no_reference() -> None:
    config, form = (
        DecoderConfig(**TINY, tie_word_embeddings=False),
        AdapterForm(4, 8.0, targets=("q_proj", "down_proj")),
    )
    own = 3 * 4 * ((96 + 96) + (200 + 96))
    plan = training_memory(config, micro_batch_tokens=512, reference=True, lora=form)
    assert form.num_parameters(config) == own
    assert plan.weights_bytes == 4 * (config.num_parameters + own)
    assert (plan.gradients_bytes, plan.optimizer_bytes, plan.reference_bytes) == (4 * own, 8 * own, 0)


def test_a_frozen_network_saves_the_products_of_its_weights_gradients() -> None:
    plain = flops_per_token(LLAMA_8B, context=0, training=True)
    assert flops_per_token(LLAMA_8B, context=0, training=True, frozen=True) == pytest.approx(plain * 2 / 3)


@pytest.mark.parametrize(
    "config",
    [DecoderConfig(**TINY), GEMMA, DecoderConfig(**TINY, attention_softcap=5.0)],
    ids=["plain", "gemma", "capped scores"],
)
def test_kept_activations_are_near_those_that_torch_keeps(config: DecoderConfig) -> None:
    import torch

    from twinloop.models.attention import Path, TreePaths
    from twinloop.models.decoder import Decoder

    network = Decoder(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(1, 512, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = network.hidden(tokens, torch.arange(512)[None], TreePaths([Path((0, 512))]))
    estimate = training_memory(config, micro_batch_tokens=512).activations_bytes
    assert hidden.requires_grad
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.15)


def test_the_cache_is_that_of_the_engines_slots() -> None:
    one = serving_memory(LLAMA_8B, precision="bf16", slots=1, max_length=8192)
    token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, width, bytes
    assert one.kv_cache_bytes == token * (8192 + 16)
    assert serving_memory(LLAMA_8B, precision="bf16", slots=8, max_length=4095).kv_cache_bytes == 8 * token * 4096
    assert serving_memory(LLAMA_8B, precision="int8", slots=1, max_length=15).kv_cache_bytes == 2 * token * 16
    assert one.weights_bytes == 2 * LLAMA_8B.num_parameters
    assert one.scales_bytes == 0
    assert one.runtime_bytes > 0
    assert one.total_bytes > 15.9 * 2**30


def test_compute_is_six_a_weight_and_attention() -> None:
    matrices = LLAMA_8B.num_parameters - LLAMA_8B.vocab_size * LLAMA_8B.hidden_size - 65 * 4096
    assert flops_per_token(LLAMA_8B, context=0, training=True) == 6 * matrices
    assert flops_per_token(LLAMA_8B, context=0, training=False) == 2 * matrices
    attention = flops_per_token(LLAMA_8B, context=100, training=False) - 2 * matrices
    assert attention == 4 * 32 * 4096 * 100
    assert flops_per_token(LLAMA_8B, context=100, training=True) == 3 * (2 * matrices + attention)


def test_a_window_bounds_the_compute_of_its_layer() -> None:
    plain, windowed = DecoderConfig(**TINY), DecoderConfig(**TINY, windows=(9, None, 9))

    def attention(config: DecoderConfig, context: float) -> float:
        return flops_per_token(config, context=context, training=False) - flops_per_token(
            config, context=0, training=False
        )

    assert attention(windowed, 5) == attention(plain, 5)
    assert attention(windowed, 90) == attention(plain, 90) * (9 + 90 + 9) / (3 * 90)


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(UserError, match="slots is 0"):
        serving_memory(LLAMA_8B, precision="fp16", slots=0, max_length=10)
    with pytest.raises(UserError, match="micro_batch_tokens is nan"):
        training_memory(LLAMA_8B, micro_batch_tokens=math.nan)  # type: ignore[arg-type]
