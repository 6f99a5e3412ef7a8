"""Training speed beside that of TRL and nanochat, on the same network, records and cores, as ratios in one run.

    python -m benchmarks.peers [RECIPE] [--threads 1 2] [--sizes small medium] [--methods pretrain sft reward dpo grpo]
                               [--nanochat CHECKOUT] [--rounds 3] [--steps 8] [--peers .peers]

The peers live in an environment of their own, which the first run makes (a gigabyte). nanochat is no package: it takes
part where a checkout is named. Contestants take turns, round after round; each one's best round counts. Steps hold as
many records on both sides; a peer has AdamW, the optimizer that it uses by default. RL rewards at random,
and its answers run to the limit.

small: the network of the recipe (0.93M in recipes/returns.yaml); medium: 10M, the same vocabulary. A recipe with a base
that is there already, such as recipes/smollm2.yaml, is measured on that alone; where a stage trains an adapter, TRL
trains one of its rank with PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import call, install
from benchmarks.table import Row, promise, show
from benchmarks.workload import Workload, arguments, open_workload
from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.tasks.base_settings import NewBase
from twinloop.tasks.base_source import resolve_base
from twinloop.tasks.recipe import TrainStage
from twinloop.training.settings import PackedSettings, RolloutSettings
from twinloop.training.weights import get_weights, new_decoder

PACKAGES = ("torch==2.13.0", "trl==1.16.0", "transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0")
HERE = Path(__file__).parent
MEDIUM_DEPTH, MEDIUM_WIDTH = 8, 320
METHODS = ("pretrain", "sft", "reward", "dpo", "grpo")
WANTED = {"pretrain": 1.3, "sft": 1.5, "dpo": 2.0, "grpo": 2.5}
"""Times the best peer, where the project promises something."""
WANTED_OF_ADAPTERS = WANTED | {"dpo": 1.5}
"""Where a stage trains an adapter."""
SCALE = 0.5
"""Of the recipe's data set."""
WARM_STEPS = 2


@dataclass(frozen=True)
class Contestant:
    name: str
    command: list[str]
    environment: dict[str, str]
    job: dict[str, Any]


@dataclass
class Score:
    """The best of all rounds: units (tokens, pairs, answers) a second of the wall clock and of CPU time."""

    wall: float = 0.0
    cpu: float = 0.0

    def add(self, result: dict[str, float]) -> None:
        self.wall = max(self.wall, result["units"] / result["wall_s"])
        self.cpu = max(self.cpu, result["units"] / result["cpu_s"])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", nargs="+", choices=["small", "medium"], default=["small", "medium"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured in a round, after two that warm up")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder of the peers' environment")
    options = parser.parse_args()
    try:
        python = install(options.peers, PACKAGES)
        with open_workload(options, SCALE) as workload, tempfile.TemporaryDirectory(prefix="twinloop-peers-") as folder:
            show(measure(workload, options, python, Path(folder)))
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(workload: Workload, options: argparse.Namespace, python: Path, folder: Path) -> Iterator[Row]:
    base = resolve_base(workload.recipe, Path.cwd())
    for size in ["base"] if base.source else options.sizes:
        if base.source:
            model = folder / size
            save_model(model, base.config, base.source.load_weights(), workload.tokenizer)
        else:
            model = save_untrained(workload, size, folder / size)
        for stage in workload.recipe.train:
            if stage.method.name not in options.methods:
                continue
            for threads in options.threads:
                job = describe(workload, stage, model, threads, options.steps, folder)
                yield from compare(size, job, contestants(job, options, python, folder), options.rounds)


def save_untrained(workload: Workload, size: str, out: Path) -> Path:
    save_model(out, config := network(workload, size), get_weights(new_decoder(config, seed=1)), workload.tokenizer)
    return out


def network(workload: Workload, size: str) -> DecoderConfig:
    if size == "small":
        return workload.config
    medium = NewBase(depth=MEDIUM_DEPTH, hidden_size=MEDIUM_WIDTH, max_length=workload.base.max_length)
    return medium.decoder_config(workload.tokenizer.vocab_size)


def describe(
    workload: Workload, stage: TrainStage, model: Path, threads: int, steps: int, folder: Path
) -> dict[str, Any]:
    """The job that all contestants get: twice as many records as its steps take, since some compute something of each
    before they train. examples: records of an average step of ours."""
    records, settings = list(workload.records(stage.method.records)), stage.settings
    job: dict[str, Any] = {
        "stage": stage.name,
        "method": stage.method.name,
        "model": str(model),
        "records": str(folder / f"{stage.name}-records.jsonl"),
        "data": str(folder / f"{stage.name}.jsonl"),
        "domain": workload.recipe.domain,
        "settings": settings.model_dump(mode="json", exclude_computed_fields=True),
        "threads": threads,
        "runtime": workload.runtime.model_copy(update={"threads": threads}).model_dump(),
        "steps": steps,
        "warm_steps": WARM_STEPS,
        "learning_rate": 1e-4,
        "lora_rank": settings.lora.rank if settings.lora else 0,
    }
    if isinstance(settings, PackedSettings):
        lengths = [tree_tokens(workload, stage, record) for record in records]
        job |= {
            "rows": settings.batch_size,
            "seq_len": settings.seq_len,
            "examples": max(1, round(settings.batch_tokens * len(lengths) / sum(lengths))),
        }
    elif isinstance(settings, RolloutSettings):
        job |= {
            "examples": settings.prompts_per_step,
            "group_size": settings.group_size,
            "max_new_tokens": settings.max_new_tokens,
        }
    kept = records[: 2 * job["examples"] * (WARM_STEPS + steps)]
    write_lines(Path(job["records"]), kept)
    write_lines(Path(job["data"]), [encoded(workload, stage.method.name, record) for record in kept])
    return job


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tree_tokens(workload: Workload, stage: TrainStage, record: dict[str, Any]) -> int:
    lengths = stage.method.lengths(record, workload.tokenizer)
    return lengths.packed if lengths else len(workload.tokenizer.encode_document(record["text"]))


def encoded(workload: Workload, method: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record as TRL takes it: the same tokens, or the text that gives them."""
    tokenizer = workload.tokenizer
    if method == "pretrain":
        return {"input_ids": tokenizer.encode_document(record["text"])}
    if method == "sft":
        *prompt, answer = record["messages"]
        before, after = tokenizer.encode_prompt(prompt), tokenizer.encode_answer(answer["content"])
        return {"input_ids": [*before, *after], "completion_mask": [0] * len(before) + [1] * len(after)}
    if method == "reward":
        prompt = tokenizer.encode_prompt(record["prompt"])
        return {f"{side}_ids": prompt + tokenizer.encode_answer(record[side]) for side in ("chosen", "rejected")}
    text = {"prompt": tokenizer.render(record["prompt"])}
    return text if method == "grpo" else text | {name: record[name] for name in ("chosen", "rejected")}


def contestants(job: dict[str, Any], options: argparse.Namespace, python: Path, folder: Path) -> list[Contestant]:
    threads = {"OMP_NUM_THREADS": str(job["threads"])}
    trl = [str(python), str(HERE / "peer_trl.py")]
    found = [Contestant("twinloop", [sys.executable, "-m", "benchmarks.peer_twinloop"], threads, job)]
    settings = ("packed", "padded") if job["method"] in ("pretrain", "sft") else ("",)
    found += [Contestant(f"TRL {each}".strip(), trl, threads, job | {"setting": each}) for each in settings]
    if job["method"] == "pretrain" and options.nanochat:
        path = {"PYTHONPATH": str(options.nanochat)}
        found.append(Contestant("nanochat", [str(python), str(HERE / "peer_nanochat.py")], threads | path, job))
    return found


def compare(size: str, job: dict[str, Any], runners: list[Contestant], rounds: int) -> Iterator[Row]:
    scores = {each.name: Score() for each in runners}
    for number in range(rounds):
        for each in runners:
            print(f"{size}, {job['stage']}, {job['threads']} threads: {each.name}, round {number + 1}",
                  file=sys.stderr, flush=True)  # fmt: skip
            scores[each.name].add(run(each))
    ours = scores.pop("twinloop")
    unit = {"dpo": "pairs/s", "reward": "pairs/s", "grpo": "answers/s"}.get(job["method"], "tokens/s")
    setting = f"{size}, {job['threads']} thread{'s' * (job['threads'] > 1)}"
    yield Row(job["stage"], setting, f"{ours.wall:,.1f}", unit)
    for name, score in scores.items():
        yield Row(f"· {name}", setting, f"{score.wall:,.1f}", unit)
    ratio = min(ours.wall / score.wall for score in scores.values())
    by_cpu = min(ours.cpu / score.cpu for score in scores.values())
    wanted = (WANTED_OF_ADAPTERS if job["lora_rank"] else WANTED).get(job["method"])
    yield Row("· ratio to the best of them", f"{setting}; by CPU time {by_cpu:.2f}", f"{ratio:.2f}", "times",
              *([] if wanted is None else [promise(f"at least {wanted}", ratio >= wanted)]))  # fmt: skip


def run(contestant: Contestant) -> dict[str, float]:
    """What its last line says. Raises UserError, with its last words, where it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(json.dumps(contestant.job))
        file.flush()
        what = f"{contestant.name}, {contestant.job['method']}"
        said = call(what, [*contestant.command, file.name], {**os.environ, **contestant.environment})
    result: dict[str, float] = json.loads(said.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
