"""CTranslate2's part of the comparison, in the peers' environment: a job in, its tokens a second out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np


def measure(job: dict[str, Any]) -> dict[str, float]:
    clock = time.process_time if job["by_cpu"] else time.perf_counter
    generator = ctranslate2.Generator(
        job["model"], device="cpu", compute_type=job["compute_type"], inter_threads=1, intra_threads=job["threads"]
    )
    vocabulary = json.loads((Path(job["model"]) / "vocabulary.json").read_text(encoding="utf-8"))
    prompt = [vocabulary[each] for each in np.random.default_rng(0).integers(100, 40_000, 4096)]
    found: dict[str, float] = {}
    for length in job["prefill"]:
        _times(generator, [prompt[:length]], 1, clock)
        began = clock()
        _times(generator, [prompt[:length]], 1, clock)
        found[f"prefill {length}"] = length / (clock() - began)
    for sequences, context in job["decode"]:
        prompts = [prompt[row : row + context] for row in range(sequences)]
        times = _times(generator, prompts, job["steps"] + 1, clock)
        found[f"decode {sequences} x {context}"] = sequences * job["steps"] / (times[-1] - times[sequences - 1])
    return found


def _times(generator: Any, prompts: list[list[str]], tokens: int, clock: Callable[[], float]) -> list[float]:
    """When each token came, of each sequence after another; greedy, and no sequence ends early."""
    times: list[float] = []

    def note(result: Any) -> bool:
        times.append(clock())
        return False

    settings: dict[str, Any] = {"max_length": tokens, "min_length": tokens, "sampling_topk": 1, "beam_size": 1}
    generator.generate_batch(prompts, **settings, include_prompt_in_result=False, callback=note)
    assert len(times) == len(prompts) * tokens, f"{len(times)} tokens came of {len(prompts)} x {tokens}"
    return times


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
