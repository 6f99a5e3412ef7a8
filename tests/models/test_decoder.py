"""The network by itself."""

import pytest
import torch
import torch.nn.functional as F

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder, RMSNorm
from twinloop.models.family import read_config, write_config
from twinloop.training.weights import new_decoder

TINY = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"attention_bias": True}, {"tie_word_embeddings": False}])
def test_counted_parameters_are_those_of_the_network(change):
    config = DecoderConfig(**TINY, **change)
    assert config.num_parameters == sum(parameter.numel() for parameter in Decoder(config).parameters())


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_keys_can_begin_as_the_queries_of_their_group(key_heads):
    config = DecoderConfig(**{**TINY, "num_key_value_heads": key_heads})
    tied, drawn = (new_decoder(config, seed=3, keys_as_queries=tied) for tied in (True, False))
    for ours, other in zip(tied.model.layers, drawn.model.layers, strict=True):
        queries = ours.self_attn.q_proj.weight.view(key_heads, 4 // key_heads, 16, 64)
        keys = ours.self_attn.k_proj.weight.view(key_heads, 16, 64)
        assert torch.equal(keys, queries[:, 0])
        assert not torch.equal(keys, other.self_attn.k_proj.weight.view(key_heads, 16, 64))
        assert torch.equal(ours.self_attn.q_proj.weight, other.self_attn.q_proj.weight)


def test_a_later_token_changes_nothing_before_it():
    model = Decoder(DecoderConfig(**TINY))
    tokens = torch.arange(10)[None]
    changed = tokens.clone()
    changed[0, 7] = 39
    positions = torch.arange(10)[None]
    one, other = model.hidden(tokens, positions), model.hidden(changed, positions)
    assert torch.equal(one[:, :7], other[:, :7])
    assert not torch.equal(one[:, 7:], other[:, 7:])


def test_only_distances_between_positions_matter():
    """Rotary positions: what a cache or a packed row shifts must not change the answer."""
    model = Decoder(DecoderConfig(**TINY))
    tokens, positions = torch.arange(10)[None], torch.arange(10)[None]
    torch.testing.assert_close(
        model.hidden(tokens, positions), model.hidden(tokens, positions + 50), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling"),
        ({"rope_parameters": "default"}, "rope_parameters: 'default' is not an object"),
        ({"hidden_act": "gelu"}, "only gelu_pytorch_tanh and silu are"),
        ({"num_attention_heads": "4"}, "num_attention_heads: Input should be a valid integer"),
        ({"num_attention_heads": 0}, "num_attention_heads: Input should be greater than 0"),
        ({"num_attention_heads": True}, "num_attention_heads: Input should be a valid integer"),
        ({"num_attention_heads": 4.5, "head_dim": None}, "num_attention_heads: Input should be a valid integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: Input should be greater than 0"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"hidden_size": 96, "head_dim": 24}, r"head_dim \(24\) must be a multiple of 16"),
        ({"hidden_size": None}, "hidden_size: Field required"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: Input should be greater than 0"),
        ({"rope_parameters": {"rope_theta": "1e4"}, "rope_theta": None}, "rope_theta: Input should be a valid number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: Input should be"),
        ({"eos_token_id": []}, "eos_token_id: Input should be a valid integer"),
    ],
)
@pytest.mark.parametrize("stated", [True, False], ids=["head_dim stated", "head_dim derived"])
def test_a_broken_or_foreign_checkpoint_is_refused_in_one_line_that_names_the_field(change, message, stated):
    fields = write_config(DecoderConfig(**TINY))
    if not stated:
        del fields["head_dim"]
    with pytest.raises(UserError, match=rf"config\.json: .*{message}") as error:
        read_config(fields | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 1024}, (1024, 1024)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "mistral"}, (4096, 4096)),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, (None, 64)),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True}, ()),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False, "max_window_layers": 0}, ()),
        ({"model_type": "qwen3", "sliding_window": 1024, "max_window_layers": 0}, ()),
        ({"model_type": "llama", "sliding_window": 1024}, ()),
    ],
)
def test_each_layers_window_is_what_transformers_would_take_from_the_config(fields, windows):
    fields = write_config(DecoderConfig(**TINY, max_position_embeddings=2048)) | fields
    assert read_config(fields).windows == windows


def test_a_window_over_every_position_is_none():
    config = DecoderConfig(**TINY, max_position_embeddings=64, windows=(64, 63))
    assert [kind.window for kind in config.layer_kinds] == [None, 63]


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32)])
def test_the_norm_on_cpu_has_the_values_and_gradients_of_torchs_own(shape):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(shape[-1], eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[-1], generator=generator))
    x = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    upstream = torch.randn(shape, generator=generator)
    twin, weight = x.detach().clone().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    ours, theirs = norm(x), F.rms_norm(twin, weight.shape, weight, norm.eps)
    torch.testing.assert_close(ours, theirs)
    ours.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(norm.weight.grad, weight.grad)
