"""What LoRA adapters beside the weights cost a decode step, against the same network with its adapter merged.

    python -m benchmarks.adapters

Networks of random weights: a small one, and one of the shapes of SmolLM2-135M; adapters of rank 16 of every linear
layer. Times are of the processor, on one thread, and the least of some rounds in turns: neighbours on the cores
disturb them less.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.table import Row, show
from twinloop.models.adapter import Adapter
from twinloop.models.adapter_form import linear_layers
from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.directory import save_adapted, save_model
from twinloop.models.exported import export_model
from twinloop.models.shapes import weight_shapes
from twinloop.serving.engine import Engine
from twinloop.serving.engine.adapters import BASE, LoadedAdapter

RANK = 16
HELD = 64
"""Tokens that each slot holds."""
ROUNDS = 4
NETWORKS = {
    "small": DecoderConfig(
        vocab_size=640, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=256,
    ),
    "SmolLM2-135M": DecoderConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=256,
    ),
}  # fmt: skip
SETTINGS: tuple[tuple[str, Precision, int], ...] = (
    ("small", "fp32", 60), ("small", "int8", 60), ("SmolLM2-135M", "int8", 8),
)  # fmt: skip
"""Network, precision, and steps of a round."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        show(row for name, precision, steps in SETTINGS for row in rows_of(Path(folder), name, precision, steps))


def rows_of(folder: Path, name: str, precision: Precision, steps: int) -> Iterator[Row]:
    config, place = NETWORKS[name], folder / name
    if not place.exists():
        random = np.random.default_rng(0)
        weights = {
            key: 0.03 * random.standard_normal(shape, np.float32) + ("norm" in key)
            for key, shape in weight_shapes(config).items()
        }
        save_model(place / "base", config, weights)
        save_adapted(place / "model", place / "base", adapter_of(config, 0), skip="")
    engines = []
    for beside in (False, True):
        out = place / f"{precision}-{beside}"
        export_model(place / "model", out, precision=precision, max_length=256, adapters=beside)
        engines.append(Engine.load(out, slots=8, threads=1))
    merged, engine = engines
    four = [engine.own, *(engine.load_adapter(f"{seed}", adapter_of(config, seed)) for seed in (1, 2, 3))]
    for batch in (1, 8):
        asked: dict[str, tuple[Engine, list[LoadedAdapter]]] = {
            "merged": (merged, [BASE]),
            "no adapter": (engine, [BASE]),
            "one adapter": (engine, [engine.own]),
        }
        if batch > 1:
            asked["four adapters"] = (engine, four)
        least = step_times(asked, batch, steps)
        for what, seconds in least.items():
            setting = f"{name}, {precision}, batch {batch}, {what}"
            yield Row("decode step", setting, f"{1000 * seconds:.2f}", "ms")
            yield Row("· ratio", setting, f"{seconds / least['merged']:.2f}", "times merged")


def step_times(asked: dict[str, tuple[Engine, list[LoadedAdapter]]], batch: int, steps: int) -> dict[str, float]:
    """CPU seconds of a step of `batch` rows, each of which has one of the adapters in turn."""
    tokens, active = np.arange(batch, dtype=np.int64), np.ones(batch, bool)
    least = dict.fromkeys(asked, float("inf"))
    for _ in range(ROUNDS):
        for what, (engine, adapters) in asked.items():
            for slot in range(batch):
                engine.hold([slot], 0, adapters[slot % len(adapters)])
                engine.prefill(slot, np.arange(HELD))
            engine.decode(0, tokens, active)  # binds
            for _ in range(steps):
                started = time.process_time()
                engine.decode(0, tokens, active)
                least[what] = min(least[what], time.process_time() - started)
    return least


def adapter_of(config: DecoderConfig, seed: int) -> Adapter:
    random = np.random.default_rng(seed)
    factors = {
        name: (random.standard_normal((RANK, into), np.float32), 0.01 * random.standard_normal((out, RANK), np.float32))
        for name, (out, into) in linear_layers(config).items()
    }
    return Adapter(factors, alpha=float(RANK))


if __name__ == "__main__":
    main()
