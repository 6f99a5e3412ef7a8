"""Load test of an exported model on this machine: time to first token, speed, memory. It runs in a process of its own,
since the memory of one that has trained is no measure.

    echo '{"max_tokens": 96, "form": null, "prompts": [[1, 3, ...], ...]}' \\
        | python -m twinloop.tasks.load_test MODEL_DIR SLOTS THREADS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from twinloop.common.memory import peak_bytes
from twinloop.evaluation.metrics import percentile
from twinloop.models.label_tokenizer import load_answering
from twinloop.serving.answer_form import form_grammar
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler

CLIENTS = 4
"""Callers at the same time; each sends its next request as soon as its last answer is complete."""


class LoadTestResult(BaseModel):
    model_config = ConfigDict(frozen=True)

    p50_ttft_ms: float
    p95_ttft_ms: float
    ttft_ms: tuple[float, ...]
    """Of every request, rising; and the time to its last token."""
    answer_ms: tuple[float, ...]
    tokens_per_s: float
    """Of all answers together."""
    memory_gib: float
    """The most that the process ever held, libraries included."""


def run_load_test(
    exported_dir: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    form: Mapping[str, Any] | None,
    slots: int,
    threads: int,
) -> LoadTestResult:
    """Serve the prompts in a fresh process, greedily. form: of the answers, as `Domain.answer_form` states it.

    Raises RuntimeError with the last line of its errors when that fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "twinloop.tasks.load_test", str(exported_dir), str(slots), str(threads)],
        input=json.dumps({"max_tokens": max_tokens, "form": form, "prompts": [list(prompt) for prompt in prompts]}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"load test of {exported_dir} failed: {done.stderr.strip().splitlines()[-1:]}")
    return LoadTestResult.model_validate_json(done.stdout)


def _serve(
    exported_dir: Path, prompts: list[list[int]], params: SamplingParams, *, slots: int, threads: int
) -> LoadTestResult:
    scheduler = Scheduler(Engine.load(exported_dir, slots=slots, threads=threads))

    def ask(prompt: list[int]) -> tuple[float, float, int]:
        asked = time.perf_counter()
        stream = scheduler.submit(prompt, params)
        tokens = sum(1 for _ in stream)
        assert stream.timings.ttft_s is not None, "an answer without a first token"
        return stream.timings.ttft_s, time.perf_counter() - asked, tokens

    with ThreadPoolExecutor(CLIENTS) as clients:
        # The first steps bind buffers, as in a server that has just started. Keys and values of the last prompts are
        # displaced before those are asked again; the first ones' would be found.
        list(clients.map(ask, prompts[-CLIENTS:]))
        started = time.perf_counter()
        answers = list(clients.map(ask, prompts))
        seconds = time.perf_counter() - started
    scheduler.close()
    first_tokens_ms, answers_ms = (sorted(round(1000 * answer[n], 3) for answer in answers) for n in (0, 1))
    return LoadTestResult(
        p50_ttft_ms=percentile(first_tokens_ms, 0.5),
        p95_ttft_ms=percentile(first_tokens_ms, 0.95),
        ttft_ms=tuple(first_tokens_ms),
        answer_ms=tuple(answers_ms),
        tokens_per_s=sum(tokens for *_, tokens in answers) / seconds,
        memory_gib=peak_bytes() / 2**30,
    )


def _main(exported_dir: str, slots: str, threads: str) -> None:
    work = json.load(sys.stdin)
    tokenizer = load_answering(Path(exported_dir))
    params = SamplingParams(
        max_tokens=work["max_tokens"], stop=tokenizer.stop_ids, constraint=form_grammar(work["form"], tokenizer)
    )
    result = _serve(Path(exported_dir), work["prompts"], params, slots=int(slots), threads=int(threads))
    print(result.model_dump_json())


if __name__ == "__main__":
    _main(*sys.argv[1:])
