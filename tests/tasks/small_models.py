"""Model directories so small that a test trains them in milliseconds."""

from __future__ import annotations

from pathlib import Path

from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.training.heads import REWARD, attach_head
from twinloop.training.weights import get_weights, new_decoder

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = "the order of the other customer"


def write_model(folder: Path, *, seed: int, text: str = TEXT, positions: int = 128, reward: bool = False) -> None:
    tokenizer = train_tokenizer([text] * 4, 270)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=positions,
        **SHAPE,
    )
    network = new_decoder(config, seed=seed)
    if reward:
        attach_head(network, REWARD, tokenizer, ends=tokenizer.stop_ids)
    save_model(folder, network.config, get_weights(network), tokenizer)
