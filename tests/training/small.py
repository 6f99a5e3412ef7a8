"""A network small enough to train in milliseconds, and random tokens for it."""

import numpy as np
import torch

from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.training.tree import Tree, document, example, pair
from twinloop.training.weights import new_decoder

TINY = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)


class Texts:
    """Random token runs, seeded."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def run(self, low: int, high: int) -> list[int]:
        return self.rng.integers(6, TINY.vocab_size, self.rng.integers(low, high + 1)).tolist()

    def documents(self, count: int, low: int = 5, high: int = 30) -> list[Tree]:
        return [document(self.run(low, high)) for _ in range(count)]

    def examples(self, count: int) -> list[Tree]:
        return [example(self.run(4, 12), self.run(2, 8)) for _ in range(count)]

    def pairs(self, count: int) -> list[Tree]:
        return [pair(self.run(4, 12), self.run(2, 8), self.run(2, 8)) for _ in range(count)]


def padded(model: Decoder, rows: int) -> Decoder:
    """The same network with so many rows more in its vocabulary, which no token has and which it thinks likely."""
    tokens = model.config.vocab_size
    wide = new_decoder(model.config.model_copy(update={"vocab_size": tokens + rows}), seed=2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            wide.state_dict()[name][: len(tensor)].copy_(tensor)
        wide.model.embed_tokens.weight[tokens:] *= 50
    return wide
