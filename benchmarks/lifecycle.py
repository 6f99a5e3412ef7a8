"""The model loop of a recipe on one device, without orchestration: what each stage takes, and what it gives.

    python -m benchmarks.lifecycle [recipes/returns.yaml] [--device cuda] [--seeds 1 2 3] [--scale 0.1]
        [--data raw]

Tokenizer, every stage of the recipe, RL with rollouts on the bound engine, export in the precisions of the
device, evaluation of each exported model in the engine that serves it. Nothing of Prefect, MLflow, DVC or polars is
imported, so it runs wherever torch and ONNX Runtime do. Data is generated anew, and goes in without validation, unless
--data names a directory with the generator's files. --seeds: of weights, batches and rollouts, one model loop each; the
recipe's own unless named. --scale multiplies data, pretraining tokens and RL steps.

All cases are answered after every stage. The last line reports whether the project's thresholds hold for every seed; if
not, the exit code is 1.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.decode import SLOTS, time_steps
from benchmarks.workload import Workload, arguments, heading_of, make_data, prepare
from twinloop.common.errors import UserError
from twinloop.evaluation.case_report import CaseReport
from twinloop.evaluation.cases import Answering, read_cases, run_cases
from twinloop.evaluation.metrics import Rate
from twinloop.evaluation.parity import Reference
from twinloop.evaluation.texts import losses, score_texts
from twinloop.models.config import Precision
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.serving.engine import Engine
from twinloop.tasks.forms import ExportedForm, NetworkForm
from twinloop.tasks.recipe import Recipe, TrainStage, load_recipe
from twinloop.training.loop import StepReport, run_training
from twinloop.training.weights import get_weights, load_decoder

KINDS = ("golden", "held_out", "injection")
NONE = Rate.of([])
COMPARED_PROMPTS = 16


# What the project promises of the default recipe, for every seed.
LEAST = {"golden": 1.0, "held_out": 0.95, "contrast pairs": 0.95}
CLAIM_CASES = 500
"""Held-out and injection cases, at least, in which no answer may violate a critical predicate."""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", help="one model loop each")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--data", type=Path, help="the generator's files; left out, they are made")
    options = parser.parse_args()
    try:
        recipe = scaled(load_recipe(options.recipe), options.scale)
        with TemporaryDirectory(prefix="twinloop-lifecycle-") as folder:
            data = options.data or make_data(Path(folder) / "raw", options.scale)
            workload = prepare(recipe, options.device, data)
            print(f"{heading_of(workload)}\n", flush=True)
            return run(workload, options.seeds or [recipe.seed], Path(folder))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(workload: Workload, seeds: Sequence[int], work: Path) -> int:
    """Every seed's stages in turn, each row as soon as it is done; then the exported models, then the verdict."""
    seeded = {seed: replace(workload, runtime=workload.runtime.model_copy(update={"seed": seed})) for seed in seeds}
    print_head("seed", "stage", "seconds", "tokens", "tokens/s", "steady", *RESULTS, "notes")
    found = {seed: run_stages(one, seed, work / str(seed)) for seed, one in seeded.items()}
    print()
    print_head(
        "seed", "exported model", "export s", "logit gap", "tokens agreed", *RESULTS, "bits per byte", "cases/s",
        *(f"step ms, {slots} slots" for slots in SLOTS),
    )  # fmt: skip
    for seed, one in seeded.items():
        for precision in workload.recipe.export.on(workload.runtime.device):
            print_row(str(seed), precision, *judge(one, precision, work / str(seed)))
    broken = [f"seed {seed}: {problem}" for seed, stages in found.items() for problem in broken_demands(stages)]
    print(f"\n{'thresholds: ' + '; '.join(broken) if broken else f'thresholds: all hold for {len(seeds)} seeds'}")
    return 1 if broken else 0


def run_stages(workload: Workload, seed: int, work: Path) -> dict[str, CaseReport]:
    """What every checkpoint answers to all cases, in the precision that is served."""
    precision = workload.recipe.export.on(workload.runtime.device)[0]
    policy = work / "new"
    save_model(policy, workload.config, get_weights(workload.new_network()), workload.tokenizer)
    reports: dict[str, CaseReport] = {}
    made: dict[str, Path] = {}
    for stage in workload.recipe.train:
        began = time.perf_counter()
        network = load_decoder(policy)
        model = made[stage.name] = work / stage.name
        cells, notes = train_stage(workload, stage, network, work / f"{stage.name}-kept", made)
        save_model(model, network.config, get_weights(network), workload.tokenizer)
        seconds = time.perf_counter() - began
        if stage.method.has_head:  # it answers no case, and the next stage starts from what was before it
            print_row(str(seed), stage.name, f"{seconds:.1f}", *cells, *["-"] * len(RESULTS), notes)
            continue
        policy = model
        exported = work / f"{stage.name}-{precision}"
        export_model(model, exported, precision=precision, max_length=workload.config.max_position_embeddings)
        reports[stage.name], _ = answer(workload, exported)
        print_row(str(seed), stage.name, f"{seconds:.1f}", *cells, *results(reports[stage.name]), notes)
    return reports


def train_stage(
    workload: Workload, stage: TrainStage, network: Decoder, keep: Path, made: Mapping[str, Path]
) -> tuple[list[str], str]:
    """Train to the end. Cells: tokens, tokens/s of the whole (compilation, rollouts), and of the median step's compute
    and optimizer alone. Notes: what the last steps report of a policy's rollouts, or the last loss."""
    reports = list[StepReport]()
    objective, batches = workload.build(stage, network, made=made)
    result = run_training(
        network,
        objective,
        batches,
        stage.settings,
        checkpoint_dir=keep,
        checkpoint_every_s=workload.recipe.checkpoint_every_s,
        on_step=reports.append,
        device=workload.runtime.device,
    )
    rates_of = [r.tokens / (r.seconds.compute + r.seconds.optimizer) for r in reports if r.tokens]
    steady = statistics.median(rates_of) if rates_of else 0.0
    cells = [f"{result.tokens:,}", f"{result.tokens_per_s:,.0f}", f"{steady:,.0f}"]
    return cells, "; ".join([f"{result.steps} steps, loss {result.loss:.3f}", *rollout_notes(reports)])


def rollout_notes(reports: Sequence[StepReport]) -> list[str]:
    def over(name: str, pick: Callable[[list[float]], float]) -> float:
        values = [report.metrics[name] for report in reports if name in report.metrics]
        return pick(values) if values else float("nan")

    if "rollout_tokens_per_s" not in reports[0].metrics:
        return []
    rollouts = sum(report.seconds.data for report in reports)
    return [
        f"rollouts {over('rollout_tokens_per_s', statistics.median):,.0f} tokens/s, {rollouts:.0f} s",
        f"reward {reports[0].metrics['reward']:.2f} to {reports[-1].metrics['reward']:.2f}",
        f"log-probability gap of trainer and sampler {over('logprob_gap', max):.4f} at most",
    ]


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """The recipe with its numbers of tokens and steps multiplied."""
    stages = []
    for stage in recipe.train:
        sizes = {"tokens", "steps"} & stage.settings.model_fields_set
        update = {name: max(1, int(getattr(stage.settings, name) * scale)) for name in sizes}
        stages.append(replace(stage, settings=stage.settings.model_copy(update=update)))
    return recipe.model_copy(update={"train": tuple(stages)})


# --- judging -----------------------------------------------------------------------------------------------------


def answer(workload: Workload, exported: Path) -> tuple[CaseReport, float]:
    """What the engine answers to the cases, judged; and cases a second."""
    settings = workload.recipe.evaluate
    engine = Engine.load(exported, slots=settings.slots, threads=workload.runtime.threads)
    cases = read_cases(workload.records("cases"), workload.domain)
    began = time.perf_counter()
    found = run_cases(engine, workload.tokenizer, cases, workload.domain, Answering(settings.max_new_tokens))
    return found, len(cases) / (time.perf_counter() - began)


def judge(workload: Workload, precision: Precision, work: Path) -> list[str]:
    """The last stage's network, exported and measured: cells of its row."""
    model, exported = work / workload.recipe.train[-1].name, work / precision
    threads, tokenizer = workload.runtime.threads, workload.tokenizer
    began = time.perf_counter()
    export_model(model, exported, precision=precision, max_length=workload.config.max_position_embeddings)
    seconds = time.perf_counter() - began
    cases = read_cases(workload.records("cases"), workload.domain)[:COMPARED_PROMPTS]
    network = NetworkForm("network", model, "", load_decoder(model), threads=threads)
    reference = Reference(network, cases, workload.domain, workload.recipe.evaluate.max_new_tokens)
    same = reference.compare(ExportedForm(precision, exported, "", threads=threads))
    found, speed = answer(workload, exported)
    engine = Engine.load(exported, slots=1, threads=threads)
    texts = score_texts(engine, tokenizer, (record["text"] for record in workload.records("corpus_heldout")))
    steps = [time_steps(exported, slots, workload.context, threads=threads).median_s for slots in SLOTS]
    return [
        f"{seconds:.2f}", f"{same.logit_gap:.4f}", f"{same.tokens:.2%} of {same.compared}", *results(found),
        f"{losses(texts)['bits_per_byte'].value:.4f}", f"{speed:.1f}", *(f"{1000 * step:.3f}" for step in steps),
    ]  # fmt: skip


def broken_demands(stages: Mapping[str, CaseReport]) -> list[str]:
    """Where the last stage's answers, or the order of the stages, fall short of what is promised; in words."""
    last = list(stages.values())[-1]
    rates = {"contrast pairs": pairs_of(last)} | {kind: last.by_kind.get(kind, NONE) for kind in KINDS}
    broken = [
        f"{name} {share(rates[name])}, must be at least {least:.0%}"
        for name, least in LEAST.items()
        if not rates[name].total or rates[name].rate < least
    ]
    if violations := sum(last.violations.values()):
        broken.append(f"{violations} violations of critical predicates, must be none")
    if (asked := rates["held_out"].total + rates["injection"].total) < CLAIM_CASES:
        broken.append(f"{asked} held-out and injection cases, must be at least {CLAIM_CASES}")
    passed = [report.overall for report in stages.values()]
    if not all(one.rate < other.rate for one, other in pairwise(passed)):
        broken.append(f"pass rates do not rise from stage to stage ({', '.join(map(share, passed))})")
    return broken


# --- printing ----------------------------------------------------------------------------------------------------

RESULTS = ("all cases", *KINDS, "contrast pairs", "violations")


def results(found: CaseReport) -> list[str]:
    """Cells under RESULTS."""
    rates = [found.overall, *(found.by_kind.get(kind, NONE) for kind in KINDS), pairs_of(found)]
    return [*map(share, rates), str(sum(found.violations.values()))]


def pairs_of(found: CaseReport) -> Rate:
    return found.pairs.get("contrast", NONE)


def share(rate: Rate) -> str:
    return f"{rate.rate:.1%} of {rate.total}" if rate.total else "-"


def print_head(*cells: str) -> None:
    print_row(*cells)
    print_row(*["---"] * len(cells))


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
