"""What choosing the next tokens takes of a decode step, for a vocabulary of 49,152 (that of SmolLM2).

    python -m benchmarks.sampling

Logits are made: of rank r it is -1.5 log r (sharp), -0.95 log r (wide) or -0.8 log r (flat), in a random order and
with noise. At the temperature of the rows, 0.9 of the probability is in some 10, 2,500 and 16,000 tokens: the
candidates that are sorted suffice, or what is near the last token that is left is sorted. Times are of the processor:
it is work of one thread, and neighbours on the cores disturb it less. `full sort` is the sorting and adding up alone
that top_p would else take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.table import Row, show
from twinloop.serving.engine.sampling import AnswerSampler, SamplingParams, draw

VOCABULARY = 49_152
PROMPT = 200
BATCHES = (1, 8, 16)
ROUNDS = 25
SHAPES = {"sharp": 1.5, "wide": 0.95, "flat": 0.8}

PENALTIES = SamplingParams(temperature=0.8, repetition_penalty=1.1, frequency_penalty=0.5, presence_penalty=0.5)
PARAMS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k 40, min_p 0.05": SamplingParams(temperature=0.8, top_k=40, min_p=0.05),
    "penalties": PENALTIES,
    "penalties, top_p 0.9": replace(PENALTIES, top_p=0.9),
    "20 top_logprobs": SamplingParams(temperature=0.8, top_logprobs=20),
}


def main() -> None:
    for shape, exponent in SHAPES.items():
        print(f"\n{shape}\n")
        show(
            Row("choosing a step's tokens", f"{name}, batch {batch}", f"{1000 * seconds:.2f}", "ms")
            for batch in BATCHES
            for name, seconds in step_times(logits_of(exponent, batch)).items()
        )


def logits_of(exponent: float, batch: int) -> np.ndarray:
    random = np.random.default_rng(0)
    ranks = np.stack([1 + random.permutation(VOCABULARY) for _ in range(batch)])
    return (-exponent * np.log(ranks) + random.normal(0, 0.1, ranks.shape)).astype(np.float32)


def step_times(logits_BV: np.ndarray) -> dict[str, float]:
    """CPU seconds of a step in which all rows are drawn in one way."""
    batch, random = len(logits_BV), np.random.default_rng(1)
    prompt = random.integers(0, VOCABULARY, PROMPT).tolist()

    def step_of(params: SamplingParams) -> Callable[[], object]:
        temperature_B = np.full(batch, params.temperature, np.float32)
        needed = {row: AnswerSampler.if_needed(params, prompt) for row in range(batch)}
        samplers = {row: sampler for row, sampler in needed.items() if sampler is not None}
        return lambda: draw(logits_BV, temperature_B, random.random(batch), samplers)

    steps = {name: step_of(params) for name, params in PARAMS.items()}
    steps["full sort"] = lambda: _sorted(logits_BV)
    return {name: _median(step) for name, step in steps.items()}


def _sorted(logits_BV: np.ndarray) -> np.ndarray:
    return np.cumsum(np.exp(-np.sort(-logits_BV, axis=1)), axis=1, dtype=np.float64)


def _median(step: Callable[[], object]) -> float:
    step()
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
