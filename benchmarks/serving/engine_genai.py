"""onnxruntime-genai's part of the comparison, in the peers' environment: a job in, its tokens a second out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai


def measure(job: dict[str, Any]) -> dict[str, float]:
    clock = time.process_time if job["by_cpu"] else time.perf_counter
    config = onnxruntime_genai.Config(job["model"])
    options = {"intra_op_num_threads": job["threads"], "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = onnxruntime_genai.Model(config)
    found: dict[str, float] = {}
    for length in job["prefill"]:
        _generate(model, 1, length, 0, clock)
        found[f"prefill {length}"] = length / _generate(model, 1, length, 0, clock)[0]
    for sequences, context in job["decode"]:
        seconds = _generate(model, sequences, context, job["steps"], clock)[1]
        found[f"decode {sequences} x {context}"] = sequences * job["steps"] / seconds
    return found


def _generate(model: Any, sequences: int, context: int, steps: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds until the first tokens, and seconds of `steps` more; greedy."""
    params = onnxruntime_genai.GeneratorParams(model)
    length = context + steps + 2
    params.set_search_options(max_length=length, min_length=length, batch_size=sequences, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    prompts = np.random.default_rng(0).integers(100, 40_000, (sequences, context)).astype(np.int32)
    began = clock()
    generator.append_tokens(prompts)
    generator.generate_next_token()
    read = clock()
    for _ in range(steps):
        generator.generate_next_token()
    return read - began, clock() - read


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
