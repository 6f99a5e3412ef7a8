"""One contestant of `benchmarks.peers`: a job trained by Twinloop, as its stages train.

    python -m benchmarks.peer_twinloop JOB.json

Prints one line of JSON: {"units", "cpu_s", "wall_s", "loss"} of the measured steps.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.training import First, PaidByChance
from twinloop.domains.loader import load_domain
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.training.adapters import attach_adapter
from twinloop.training.loop import StepReport, run_training
from twinloop.training.method import load_method
from twinloop.training.runtime import Runtime
from twinloop.training.stream import Step
from twinloop.training.weights import load_decoder


class Counted(First):
    """The next steps of a stream, their tokens, pairs or answers counted."""

    def __init__(self, first: First, method: str):
        super().__init__(first.batches, first.total_steps)
        self.method, self.units = method, 0.0

    def next(self) -> Step:
        step = super().next()
        for batch in step.micro_batches:
            sequences = batch.num_sequences
            self.units += {"dpo": sequences / 2, "reward": sequences / 2, "grpo": sequences}.get(
                self.method, batch.num_tokens
            )
        return step


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(measure(job)))


def measure(job: dict[str, Any]) -> dict[str, float]:
    method = load_method(job["method"], Path.cwd())
    settings = method.settings.model_validate(job["settings"])
    runtime = Runtime.model_validate(job["runtime"])
    runtime.use()
    network, tokenizer = load_decoder(Path(job["model"])), ChatTokenizer.load(job["model"])
    if settings.lora:
        attach_adapter(network, settings.lora.form, seed=runtime.seed)
    domain = PaidByChance(load_domain(job["domain"], Path.cwd()).domain)
    records = (json.loads(line) for line in Path(job["records"]).read_text().splitlines())
    objective, batches = method.build(records, network, tokenizer, settings, runtime, domain)
    started = [0.0, 0.0]

    def on_step(step: StepReport) -> None:
        if step.step == job["warm_steps"]:
            steps.units = 0.0
            started[:] = time.process_time(), time.perf_counter()

    steps = Counted(First(batches, job["warm_steps"] + job["steps"]), job["method"])
    result = run_training(network, objective, steps, settings, checkpoint_dir=None, on_step=on_step)
    cpu, wall = time.process_time() - started[0], time.perf_counter() - started[1]
    return {"units": steps.units, "cpu_s": cpu, "wall_s": wall, "loss": result.loss}


if __name__ == "__main__":
    main()
