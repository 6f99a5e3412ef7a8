"""Our engine's part of the comparison: a job in, its tokens a second out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.engines import decode_key, prefill_key
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import choose


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Tokens a second of each prefill and each decoding. Decoding draws the likeliest token and feeds it back."""
    slots = max(sequences for sequences, _ in job["decode"])
    longest = max(*job["prefill"], *(context for _, context in job["decode"])) + job["steps"] + 2
    engine = Engine.load(job["model"], slots=slots, max_length=longest, threads=job["threads"])
    clock = time.process_time if job["by_cpu"] else time.perf_counter
    random = np.random.default_rng(0)
    found: dict[str, float] = {}
    for length in job["prefill"]:
        prompt = random.integers(0, engine.vocab_size, length)
        engine.prefill(0, prompt)  # makes its bindings
        began = clock()
        engine.prefill(0, prompt)
        found[prefill_key(length)] = length / (clock() - began)
    for sequences, context in job["decode"]:
        engine.prefill(0, random.integers(0, engine.vocab_size, context))
        if sequences > 1:
            engine.copy_prefix(0, range(1, sequences), context)
        seconds = _decode(engine, sequences, job["steps"], clock)
        found[decode_key(sequences, context)] = sequences * job["steps"] / seconds
    return found


def _decode(engine: Engine, sequences: int, steps: int, clock: Callable[[], float]) -> float:
    """Seconds of the steps."""
    tokens, active = np.ones(sequences, np.int64), np.ones(sequences, bool)
    greedy, draws = np.zeros(sequences, np.float32), np.zeros(sequences)
    engine.decode(0, tokens, active)
    began = clock()
    for _ in range(steps):
        tokens, _ = choose(engine.decode(0, tokens, active), greedy, draws)
    return clock() - began


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
