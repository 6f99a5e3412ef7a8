"""Training speed: tokens/s, and where the time of a step goes.

    python -m benchmarks.training [--device cuda] [--steps 20] [--threads 1]

One table, a row a case: the default recipe's network on each kind of batch and optimizer, on CPU; a larger network
on CUDA. `optimizer ratio` at the end is the time of a step of torch.optim.Muon over ours, on the same matrices.
`logging` is the caller's report of each step, here 20 metrics into a list, as a buffered tracker takes them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from models.config import DecoderConfig
from training.loop import StepReport, TrainResult, TrainSettings, train
from training.objectives import DirectPreference, NextToken, Objective
from training.optim import OptimizerSettings, build_optimizer
from training.scoring import attach_reference
from training.stream import BatchStream
from training.tree import Tree, document, example, pair
from training.weights import new_decoder

SMALL = DecoderConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
LARGE = DecoderConfig(
    vocab_size=32768,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
)
PROMPT, ANSWER = 70, 45  # tokens, about what a return decision takes


def random_trees(kind: str, count: int, vocab_size: int) -> list[Tree]:
    rng = np.random.default_rng(0)

    def run(mean: int) -> list[int]:
        return rng.integers(6, vocab_size, int(rng.integers(mean // 2, mean + mean // 2))).tolist()

    if kind == "documents":
        return [document(run(PROMPT + ANSWER)) for _ in range(count)]
    if kind == "examples":
        return [example(run(PROMPT), run(ANSWER)) for _ in range(count)]
    return [pair(run(PROMPT), run(ANSWER), run(ANSWER)) for _ in range(count)]


def measure(
    config: DecoderConfig, kind: str, optimizer: str, row_length: int, tokens: int, steps: int, device: str
) -> tuple[TrainResult, float]:
    """A short training run after a warm one; returns its totals and how full the rows were."""
    model = new_decoder(config, seed=0).to(device)
    count = 2 * steps * tokens // (PROMPT + ANSWER)
    trees = random_trees(kind, count, config.vocab_size)
    objective: Objective = NextToken()
    if kind == "pairs":
        trees = attach_reference(model, trees, row_length=row_length, device=device)
        objective = DirectPreference(beta=0.1)
    log: list[dict[str, float]] = []

    def report(step: StepReport) -> None:
        log.append({f"metric_{i}": step.loss for i in range(20)})

    settings = TrainSettings(learning_rate=1e-3, optimizer="adamw" if optimizer == "adamw" else "muon")
    result = TrainResult()
    for length in (5, steps):  # the first run pays for compilation
        stream = BatchStream(trees, row_length=row_length, rows_per_step=tokens // row_length, seed=0, steps=length)
        with TemporaryDirectory() as folder:
            result = train(
                model, objective, stream, settings, checkpoint_dir=Path(folder), on_step=report, device=device
            )
    return result, stream.packing.fill


def row(name: str, result: TrainResult, fill: float) -> str:
    seconds = result.seconds
    shares = [seconds.optimizer, seconds.data, seconds.report, seconds.checkpoint]
    percent = " | ".join(f"{100 * part / seconds.total:.2f}%" for part in shares)
    return f"| {name} | {result.tokens_per_s:,.0f} | {percent} | {100 * fill:.1f}% |"


def muon_ratio(config: DecoderConfig, device: str) -> tuple[float, float]:
    """Milliseconds of one optimizer step: torch.optim.Muon with AdamW beside it, and ours."""
    if not hasattr(torch.optim, "Muon"):
        return float("nan"), float("nan")
    model = new_decoder(config, seed=0).to(device)
    ours = build_optimizer(model, OptimizerSettings(learning_rate=1e-4))
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = torch.optim.Muon(hidden, lr=1e-4, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-4, fused=True)

    def theirs() -> None:
        muon.step()
        adamw.step()

    def best(step: Callable[[], None]) -> float:
        times = []
        for _ in range(15):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            times.append(time.perf_counter() - start)
        return 1e3 * min(times)

    return best(theirs), best(lambda: ours.step(1e-4))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_cuda = options.device == "cuda"
    where = torch.cuda.get_device_name() if on_cuda else f"CPU, {options.threads} threads"
    cases = [
        ("documents", "muon", 256, 4096),
        ("documents", "muon", 256, 2048),
        ("documents", "muon", 512, 4096),
        ("documents", "adamw", 256, 4096),
        ("examples", "muon", 256, 4096),
        ("pairs", "muon", 256, 4096),
    ]
    networks = [("", SMALL, cases)]
    if on_cuda:
        networks.append(("large, ", LARGE, [("documents", "muon", 2048, 65536), ("pairs", "muon", 2048, 65536)]))
    print(f"torch {torch.__version__}, {where}; {SMALL.num_parameters:,} parameters", end="")
    print(f", large {LARGE.num_parameters:,}" if on_cuda else "")
    print(
        "\n| batch | tokens/s | optimizer | data | logging | checkpoints | rows full |\n|---|---|---|---|---|---|---|"
    )
    for prefix, config, some in networks:
        for kind, optimizer, row_length, tokens in some:
            result, fill = measure(config, kind, optimizer, row_length, tokens, options.steps, options.device)
            name = f"{prefix}{kind}, {optimizer}, rows of {row_length}, {tokens // row_length} a step"
            print(row(name, result, fill), flush=True)
    for prefix, config, _ in networks:
        theirs, ours = muon_ratio(config, options.device)
        print(
            f"{prefix}optimizer step: torch.optim.Muon {theirs:.1f} ms, ours {ours:.1f} ms, ratio {theirs / ours:.2f}"
        )


if __name__ == "__main__":
    main()
