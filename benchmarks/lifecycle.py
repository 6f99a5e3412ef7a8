"""The model loop of a recipe on one device, without orchestration: what each stage takes, and what it gives.

    python -m benchmarks.lifecycle recipes/returns.yaml [--device cuda] [--scale 0.1] [--data raw]

Tokenizer, pretraining, SFT, DPO, verifier RL with rollouts on the bound engine, export in the precisions of the
device, evaluation of each bundle in the engine that serves it. Nothing of Prefect, MLflow, DVC or polars is imported,
so it runs wherever torch and ONNX Runtime do. Data is generated anew, and goes in without validation, unless --data
names a directory with the generator's files. --scale multiplies data, pretraining tokens and RL steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort
import torch
import yaml

from benchmarks.decode import time_steps
from domains.returns.generator import GeneratorParams, generate
from domains.returns.verifier import Facts, verify
from evaluation.cases import CaseReport, read_cases, run_cases
from evaluation.texts import score_texts
from models.decoder import Decoder
from models.directory import save_model
from models.errors import UserError
from models.onnx_bundle import export_bundle
from models.tokenizer import ChatTokenizer, train_tokenizer
from serving.engine import Engine
from tasks.measure import choose_cases
from tasks.parity import parity
from tasks.recipe import Optimisation, Precision, Recipe, load_recipe
from training.loop import StepReport, TrainSettings, train
from training.objectives import DirectPreference, GroupRelative, NextToken, Objective
from training.rollouts import RolloutSettings, RolloutStream
from training.scoring import attach_reference
from training.stream import Batches, BatchStream
from training.tree import document, example, pair
from training.weights import get_weights, load_decoder, new_decoder

Record = dict[str, Any]
KINDS = ("golden", "held_out", "injection")
COMPARED_PROMPTS = 16
SLOTS = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--data", type=Path, help="the generator's files; left out, they are made")
    options = parser.parse_args()
    try:
        recipe = scaled(load_recipe(options.recipe), options.scale)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU on this machine")
        with TemporaryDirectory() as folder:
            run(recipe, options.device, options.data or make_data(Path(folder) / "raw", options.scale), Path(folder))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(recipe: Recipe, device: str, data: Path, work: Path) -> None:
    """Every stage in turn; each prints its row as soon as it is done."""
    torch.set_num_threads(recipe.threads)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {recipe.threads} threads"
    began = time.perf_counter()
    tokenizer = train_tokenizer((record["text"] for record in read(data, "corpus")), recipe.tokenizer.vocab_size)
    config = recipe.model.decoder_config(tokenizer.vocab_size)
    print(f"{where}; torch {torch.__version__}, onnxruntime {ort.__version__}; {config.num_parameters:,} parameters\n")
    print_row("stage", "seconds", "tokens", "tokens/s", "steady", *KINDS, "flip pairs", "notes")
    print_row(*["---"] * 10)
    print_row("tokenizer", f"{time.perf_counter() - began:.1f}", *["-"] * 8)

    precisions = recipe.export.on(device)
    cases = list(read(data, "policy_cases"))
    model = work / "new"
    save_model(model, config, get_weights(new_decoder(config, seed=recipe.seed)), tokenizer)
    for name, prepare in STAGES.items():
        began = time.perf_counter()
        network = load_decoder(model)
        model = work / name
        objective, batches = prepare(recipe, network, tokenizer, data, device)
        cells, notes = learn(network, objective, batches, getattr(recipe, name), recipe, work / f"{name}-kept", device)
        save_model(model, config, get_weights(network), tokenizer)
        seconds = time.perf_counter() - began
        bundle = work / f"{name}-{precisions[0]}"
        export_bundle(model, bundle, precision=precisions[0], max_length=recipe.model.max_length)
        found, _ = answer(bundle, recipe, tokenizer, choose_cases(cases, recipe.evaluate.stage_cases))
        print_row(name, f"{seconds:.1f}", *cells, *rates(found), notes)

    print()
    print_row(
        "bundle", "export s", "logit gap", "tokens agreed", *KINDS, "flip pairs", "side-effect claims", "bits per byte",
        "cases/s", *(f"step ms, {slots} slots" for slots in SLOTS),
    )  # fmt: skip
    print_row(*["---"] * (10 + len(SLOTS)))
    for precision in precisions:
        print_row(precision, *judge(precision, model, work / precision, recipe, tokenizer, data, cases))


# --- data --------------------------------------------------------------------------------------------------------


def scaled(recipe: Recipe, scale: float) -> Recipe:
    tokens, steps = max(1, int(recipe.pretrain.tokens * scale)), max(1, int(recipe.rlvr.steps * scale))
    return recipe.model_copy(
        update={
            "pretrain": recipe.pretrain.model_copy(update={"tokens": tokens}),
            "rlvr": recipe.rlvr.model_copy(update={"steps": steps}),
        }
    )


def make_data(out: Path, scale: float) -> Path:
    params = yaml.safe_load(Path("params.yaml").read_text())["generate"]
    scaled_counts = {name: value for name, value in params.items() if name == "seed" or not isinstance(value, int)}
    scaled_counts |= {name: max(8, int(params[name] * scale)) for name in params if name not in scaled_counts}
    generate(GeneratorParams(**scaled_counts), out)
    return out


def read(data: Path, name: str) -> Iterable[Record]:
    with (data / f"{name}.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


# --- stages: the network, and what it learns from ----------------------------------------------------------------


def pretrain(
    recipe: Recipe, network: Decoder, tokenizer: ChatTokenizer, data: Path, device: str
) -> tuple[Objective, Batches]:
    settings = recipe.pretrain
    texts = [record["text"] for record in read(data, "corpus")]
    trees = [document([tokenizer.bos_id, *ids, tokenizer.stop_id]) for ids in tokenizer.encode_batch(texts)]
    return NextToken(), BatchStream(trees, steps=settings.steps, seed=recipe.seed, **packed(settings))


def sft(
    recipe: Recipe, network: Decoder, tokenizer: ChatTokenizer, data: Path, device: str
) -> tuple[Objective, Batches]:
    trees = []
    for record in read(data, "sft_examples"):
        *prompt, reply = record["messages"]
        trees.append(example(tokenizer.encode_prompt(prompt), tokenizer.encode_answer(reply["content"])))
    return NextToken(), BatchStream(trees, epochs=recipe.sft.epochs, seed=recipe.seed, **packed(recipe.sft))


def dpo(
    recipe: Recipe, network: Decoder, tokenizer: ChatTokenizer, data: Path, device: str
) -> tuple[Objective, Batches]:
    pairs = [
        pair(
            tokenizer.encode_prompt(record["prompt"]),
            tokenizer.encode_answer(record["chosen"]),
            tokenizer.encode_answer(record["rejected"]),
        )
        for record in read(data, "preference_pairs")
    ]
    trees = attach_reference(network, pairs, row_length=recipe.dpo.row_length, device=device)
    batches = BatchStream(trees, epochs=recipe.dpo.epochs, seed=recipe.seed, **packed(recipe.dpo))
    return DirectPreference(beta=recipe.dpo.beta), batches


def rlvr(
    recipe: Recipe, network: Decoder, tokenizer: ChatTokenizer, data: Path, device: str
) -> tuple[Objective, Batches]:
    settings = recipe.rlvr
    records = list(read(data, "rl_prompts"))
    facts = [Facts.from_record(record["facts"]) for record in records]
    rollouts = RolloutStream(
        network,
        [tokenizer.encode_prompt(record["prompt"]) for record in records],
        lambda prompt, reply: verify(reply, facts[prompt]),
        tokenizer.decode,
        RolloutSettings(
            prompts_per_step=settings.prompts_per_step,
            group=settings.group_size,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            updates_per_rollout=settings.updates_per_rollout,
        ),
        steps=settings.steps,
        seed=recipe.seed,
        stop_ids=[tokenizer.stop_id],
        micro_rows=settings.micro_rows,
        reference=copy.deepcopy(network) if settings.kl else None,
        device=device,
    )
    return GroupRelative(clip=settings.clip, kl=settings.kl), rollouts


Prepare = Callable[[Recipe, Decoder, ChatTokenizer, Path, str], tuple[Objective, Batches]]
STAGES: dict[str, Prepare] = {"pretrain": pretrain, "sft": sft, "dpo": dpo, "rlvr": rlvr}


def packed(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("row_length", "rows_per_step", "micro_rows")}


def learn(
    network: Decoder, objective: Objective, batches: Batches, settings: Optimisation, recipe: Recipe, keep: Path,
    device: str,
) -> tuple[list[str], str]:  # fmt: skip
    """Train to the end. Cells: tokens, tokens/s of the whole (compilation, rollouts), and of the median step's compute
    and optimizer alone. Notes: what the last steps say of a policy's rollouts, or the last loss."""
    reports: list[StepReport] = []
    copied = ("learning_rate", "warmup", "decay", "optimizer", "weight_decay")
    chosen = {name: getattr(settings, name) for name in copied}
    loop = TrainSettings(checkpoint_every_s=recipe.checkpoint_every_s, threads=recipe.threads, **chosen)
    result = train(network, objective, batches, loop, checkpoint_dir=keep, on_step=reports.append, device=device)
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


# --- judging -----------------------------------------------------------------------------------------------------


def answer(bundle: Path, recipe: Recipe, tokenizer: ChatTokenizer, records: list[Record]) -> tuple[CaseReport, float]:
    """What the engine answers to the cases, judged; and cases a second."""
    engine = Engine.load(bundle, slots=recipe.evaluate.slots, threads=recipe.threads)
    cases = read_cases(records, Facts.from_record)
    began = time.perf_counter()
    found = run_cases(engine, tokenizer, cases, verify, max_tokens=recipe.evaluate.max_new_tokens)
    return found, len(cases) / (time.perf_counter() - began)


def judge(
    precision: Precision, model: Path, bundle: Path, recipe: Recipe, tokenizer: ChatTokenizer, data: Path,
    cases: list[Record],
) -> list[str]:  # fmt: skip
    began = time.perf_counter()
    export_bundle(model, bundle, precision=precision, max_length=recipe.model.max_length)
    seconds = time.perf_counter() - began
    prompts = [tokenizer.encode_prompt(case["prompt"]) for case in cases[:COMPARED_PROMPTS]]
    longest, stop = recipe.rlvr.max_new_tokens, tokenizer.stop_id
    same = parity(model, bundle, prompts, max_tokens=longest, stop_id=stop, threads=recipe.threads)
    found, speed = answer(bundle, recipe, tokenizer, cases)
    engine = Engine.load(bundle, slots=1, threads=recipe.threads)
    text = score_texts(engine, tokenizer, (record["text"] for record in read(data, "corpus_heldout")))
    steps = [time_steps(bundle, slots, recipe.threads)[0] for slots in SLOTS]
    return [
        f"{seconds:.2f}", f"{same.logit_gap:.4f}", f"{same.token_agreement:.2%} of {same.tokens}", *rates(found),
        str(found.side_effect_claims), f"{text.bits_per_byte:.4f}", f"{speed:.1f}", *steps,
    ]  # fmt: skip


def rates(found: CaseReport) -> list[str]:
    shown = [found.kind(kind) for kind in KINDS]
    return [f"{rate.rate:.1%} of {rate.total}" if rate and rate.total else "-" for rate in [*shown, found.flip_pairs]]


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
