"""llama.cpp's part of the comparison, by its own `llama-batched-bench`: a job in, its tokens a second out."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import last_words
from benchmarks.serving.clock import cpu_seconds
from benchmarks.serving.engines import decode_key, prefill_key


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Its prompts are random tokens; sequences that are decoded together share theirs, as ours do."""
    steps, found = job["steps"], dict[str, float]()
    alone = [context for sequences, context in job["decode"] if sequences == 1]
    for length, seconds in _read_and_decode(job, sorted({*job["prefill"], *alone}), 1).items():
        if length in job["prefill"]:
            found[prefill_key(length)] = length / seconds[0]
        if length in alone:
            found[decode_key(1, length)] = steps / seconds[1]
    for sequences, context in job["decode"]:
        if sequences > 1:
            (seconds,) = _read_and_decode(job, [context], sequences).values()
            found[decode_key(sequences, context)] = sequences * steps / seconds[1]
    return found


def _read_and_decode(job: dict[str, Any], prompts: Sequence[int], sequences: int) -> dict[int, tuple[float, float]]:
    """By length of the prompt: seconds to read it, and of the job's steps.

    It says how long they took by the clock. Of CPU time it says nothing, and its lines are all that is seen from
    outside, one behind each prompt and its steps: so each length is run with one step too.
    """
    found, steps = {}, job["steps"]
    lines = _bench(job, prompts, [1, 1 + steps] if job["by_cpu"] else [steps], sequences)
    for length in prompts:
        spent = [line for line in lines if line["pp"] == length]
        if job["by_cpu"]:
            once, more = (line["cpu_s"] for line in spent)
            found[length] = once - (more - once) / steps, more - once
        else:
            found[length] = spent[0]["t_pp"], spent[0]["t_tg"]
    return found


def _bench(job: dict[str, Any], prompts: Sequence[int], steps: Sequence[int], sequences: int) -> list[dict[str, Any]]:
    """Its lines, with the CPU seconds since the line before. The first one is of a run that only warms up."""
    size = sequences * (max(prompts) + max(steps))
    numbers = {"-t": job["threads"], "-tb": job["threads"], "-c": size, "-npl": sequences}
    lists = {"-npp": [16, *prompts], "-ntg": steps}
    command = [job["program"], "-m", job["model"], "-pps", "--output-format", "jsonl"]
    command += [part for name, number in numbers.items() for part in (name, str(number))]
    command += [part for name, each in lists.items() for part in (name, ",".join(map(str, each)))]
    lines: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as bench,
    ):
        assert bench.stdout is not None
        before = 0.0
        for line in bench.stdout:
            if line.startswith("{"):
                now = cpu_seconds(bench.pid)
                lines.append(json.loads(line) | {"cpu_s": now - before})
                before = now
        code = bench.wait()
        if code or len(lines) != (1 + len(prompts)) * len(steps):
            errors.seek(0)
            sys.exit(last_words(code, errors.read()))
    return lines[len(steps) :]


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
