"""Exported models whose graph takes adapters, and adapters for them, of several ranks and targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twinloop.models.adapter import Adapter, save_adapter
from twinloop.models.adapter_form import TARGETS, linear_layers
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.directory import ADAPTER, BASE, SavesItself, save_adapted, save_model
from twinloop.models.exported import export_model
from twinloop.models.shapes import weight_shapes

CONFIG = DecoderConfig(
    vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, attention_bias=True, tie_word_embeddings=False, max_position_embeddings=256,
)  # fmt: skip
MAX_LENGTH = 256


def random_adapter(seed: int, rank: int, config: DecoderConfig = CONFIG, targets: tuple[str, ...] = TARGETS) -> Adapter:
    """One that changes what the network says."""
    random = np.random.default_rng(seed)
    factors = {
        name: (
            random.normal(0, 0.3, (rank, into)).astype(np.float32),
            random.normal(0, 0.3, (out, rank)).astype(np.float32),
        )
        for name, (out, into) in linear_layers(config).items()
        if name.endswith(targets)
    }
    return Adapter(factors, alpha=0.7 * rank)


ADAPTERS = {
    "four": random_adapter(1, 4),
    "nine": random_adapter(2, 9),
    "two targets": random_adapter(3, 3, targets=("q_proj", "down_proj")),
    "one": random_adapter(4, 1),
}


def random_weights(config: DecoderConfig = CONFIG, seed: int = 7) -> dict[str, np.ndarray]:
    """Of a network whose greedy answers hang on every token before."""
    random = np.random.default_rng(seed)
    return {
        name: 1 + random.normal(0, 0.1, shape).astype(np.float32)
        if "norm" in name
        else random.normal(0, 1 if "embed" in name else 0.25, shape).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }


@dataclass(frozen=True)
class Exports:
    """Of one base, in a folder: the adapted model with an adapter of its own, and its exports."""

    folder: Path
    config: DecoderConfig = CONFIG
    tokenizer: SavesItself | None = None

    def adapted(self, name: str, adapter: Adapter) -> Path:
        """An adapted model."""
        source, out = self.folder / "source", self.folder / name
        if not source.exists():
            save_model(source, self.config, random_weights(self.config), self.tokenizer)
        if not out.exists():
            save_adapted(out, source, adapter, skip="")
        return out

    def exported(self, name: str, adapter: Adapter, precision: Precision = "fp32", *, adapters: bool = True) -> Path:
        out = self.folder / f"{name}-{precision}-{'beside' if adapters else 'merged'}"
        if not out.exists():
            model = self.adapted(name, adapter)
            length = self.config.max_position_embeddings
            export_model(model, out, precision=precision, max_length=length, adapters=adapters)
        return out


def as_peft(folder: Path, adapter: Adapter) -> Path:
    """The adapter's PEFT directory."""
    save_adapter(folder / ADAPTER, adapter, base=BASE)
    return folder / ADAPTER
