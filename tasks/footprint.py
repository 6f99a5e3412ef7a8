"""What serving a bundle takes on this machine: time to first token, speed, memory. In a process of its own, because
the memory of one that has trained says nothing.

    echo '[[1, 3, ...], ...]' | python -m twinloop.tasks.footprint BUNDLE SLOTS THREADS STOP_ID MAX_TOKENS
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from twinloop.evaluation.metrics import percentile
from twinloop.serving.engine import Engine
from twinloop.serving.sampling import SamplingParams
from twinloop.serving.scheduler import Scheduler

CLIENTS = 4
"""Customers who ask at the same time, each for the next answer as soon as the last one is there."""


class Footprint(BaseModel):
    model_config = ConfigDict(frozen=True)

    p50_ttft_ms: float
    p95_ttft_ms: float
    tokens_per_s: float
    """Of all answers together."""
    memory_gib: float
    """The most that the process ever held, libraries included."""


def measure_footprint(
    bundle: Path, prompts: Sequence[Sequence[int]], *, slots: int, threads: int, stop_id: int, max_tokens: int
) -> Footprint:
    """Serve the prompts in a fresh process. Raises RuntimeError with its last words when that fails."""
    numbers = [str(number) for number in (slots, threads, stop_id, max_tokens)]
    done = subprocess.run(
        [sys.executable, "-m", "twinloop.tasks.footprint", str(bundle), *numbers],
        input=json.dumps([list(prompt) for prompt in prompts]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring {bundle} failed: {done.stderr.strip().splitlines()[-1:]}")
    return Footprint.model_validate_json(done.stdout)


def _serve(
    bundle: Path, prompts: list[list[int]], slots: int, threads: int, stop_id: int, max_tokens: int
) -> Footprint:
    engine = Engine.load(bundle, slots=slots, threads=threads)
    scheduler = Scheduler(engine)
    params = SamplingParams(max_tokens=max_tokens, stop=(stop_id,))

    def ask(prompt: list[int]) -> tuple[float, int]:
        stream = scheduler.submit(prompt, params)
        tokens = sum(1 for _ in stream)
        assert stream.timings.ttft_s is not None, "an answer without a first token"
        return stream.timings.ttft_s, tokens

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, prompts[:CLIENTS]))  # the first steps bind buffers, as in a server that has just started
        started = time.perf_counter()
        answers = list(clients.map(ask, prompts))
        seconds = time.perf_counter() - started
    scheduler.close()
    first_tokens_ms = [1000 * ttft_s for ttft_s, _ in answers]
    return Footprint(
        p50_ttft_ms=percentile(first_tokens_ms, 0.5),
        p95_ttft_ms=percentile(first_tokens_ms, 0.95),
        tokens_per_s=sum(tokens for _, tokens in answers) / seconds,
        memory_gib=_peak_bytes() / 2**30,
    )


def _peak_bytes() -> int:
    """The most memory that this process held. On Linux ru_maxrss may be the parent's, so the kernel's mark is read."""
    status = Path("/proc/self/status")
    if status.exists():
        marks = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(marks["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


if __name__ == "__main__":
    folder, *figures = sys.argv[1:]
    print(_serve(Path(folder), json.load(sys.stdin), *map(int, figures)).model_dump_json())
