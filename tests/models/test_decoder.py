"""The network by itself."""

import pytest
import torch

from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import UserError

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"attention_bias": True}, {"tie_word_embeddings": False}])
def test_counted_parameters_are_those_of_the_network(change):
    config = DecoderConfig(**TINY, **change)
    assert config.num_parameters == sum(parameter.numel() for parameter in Decoder(config).parameters())


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
        ({"hidden_act": "gelu"}, "only silu is"),
    ],
)
def test_a_foreign_checkpoint_is_refused_in_one_line(change, message):
    fields = DecoderConfig(**TINY).to_huggingface() | change
    with pytest.raises(UserError, match=message) as error:
        DecoderConfig.from_huggingface(fields)
    assert "\n" not in str(error.value)
