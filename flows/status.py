"""Commands about releases: what is served, checked, promoted, rolled back, and what a recipe would take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import Registry

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from twinloop.tasks.plan import Plan
    from twinloop.tasks.recipe import Recipe
    from twinloop.training.runtime import Runtime

FOLLOW = "running servers follow within seconds"


def check_model(project: Path, model: str) -> None:
    """Raises UserError for a model that no recipe makes and of which no version is registered."""
    from twinloop.tasks.recipe import recipe_names

    mlruns, known = Mlruns(project / "mlruns"), recipe_names(project)
    if model in known or Registry(mlruns, model).snapshot().versions:
        return
    if not mlruns.local_database or mlruns.database.exists():
        known |= {found.name for found in mlruns.client.search_registered_models()}
    names = ", ".join(sorted(known)) or "none"
    raise UserError(f"{model}: no such model; there are: {names}")


def show_status(project: Path, model: str, *, as_json: bool) -> int:
    from twinloop.registry.status import status

    found = status(Registry.of(project, model))
    print(found.to_json() if as_json else found.to_text())
    return 0


def write_version_report(project: Path, model: str, number: int | None) -> int:
    """The report of a version, again. number: None for the champion, or else the candidate."""
    from twinloop.registry.versions import CANDIDATE, CHAMPION
    from twinloop.report.files import write_report
    from twinloop.report.kept import kept_figures
    from twinloop.report.tracked import read_story
    from twinloop.tasks.release import version_to_judge

    registry = Registry.of(project, model)
    version = registry.version(number) if number else version_to_judge(registry, CHAMPION, CANDIDATE)
    story = read_story(registry.mlruns, model, version.version)
    for path in write_report(project, story, kept_figures(project, story)):
        print(path)
    return 0


def export_version(project: Path, model: str, version: str, form: str, out: Path, *, type: str | None) -> int:
    from twinloop.tasks.conversion import convert_version

    done = convert_version(project, Registry.of(project, model), version, form, out, type=type)
    print(f"{done.version} in {out}:")
    for name, size in done.files.items():
        print(f"  {name:<28} {size:>14,} bytes")
    for note in done.notes:
        print(f"  {note}")
    print(f"load it: {done.load}")
    return 0


def promote_version(project: Path, model: str, version: int) -> int:
    from twinloop.registry.ledger import who
    from twinloop.registry.promotion import promote

    done = promote(Registry.of(project, model), version, who=who(), manual=True)
    report = f" (gate report {done.gate_digest})" if done.gate_digest else ""
    print(f"{model} version {done.to_version} is the champion{report}; {FOLLOW}")
    return 0


def roll_back(project: Path, model: str) -> int:
    from twinloop.flows.releases import smoke_test_for_rollback
    from twinloop.registry.ledger import who
    from twinloop.registry.promotion import rollback

    test = smoke_test_for_rollback(project, lambda answer: print(f"smoke test: {answer}"))
    done = rollback(Registry.of(project, model), who(), test)
    print(f"{model} version {done.to_version} is the champion again, after version {done.from_version}; {FOLLOW}")
    if done.finished_later:
        print(f"this rollback, begun by {done.who} on {done.when}, had been interrupted")
        print("run the command again to go back further")
    return 0


def judge_now(project: Path, recipe_path: Path, number: int | None) -> int:
    """The gate, without Prefect: a person waits for it. 0 on SHIP, 1 on BLOCK. number: of the version to judge; None
    for the candidate, or else the champion."""
    from twinloop.domains.loader import load_domain
    from twinloop.evaluation.gate import load_rules
    from twinloop.flows.display import make_display
    from twinloop.flows.gpu import gpu_slot
    from twinloop.registry.ledger import who
    from twinloop.registry.promotion import finish_interrupted
    from twinloop.registry.reconcile import what_it_is
    from twinloop.registry.versions import CANDIDATE, CHAMPION
    from twinloop.tasks.context import Context
    from twinloop.tasks.prepare import ready_data
    from twinloop.tasks.recipe import load_recipe
    from twinloop.tasks.release import judge_version, version_to_judge

    recipe = load_recipe(recipe_path, project)
    rules = load_rules(project / recipe.gate.rules, load_domain(recipe.domain, project).domain)
    runtime = recipe.runtime()
    with make_display() as display, gpu_slot(project, runtime, shared=False):
        context = Context.of(project, recipe_path, recipe, display)
        registry = Registry(context.mlruns, context.recipe)
        finish_interrupted(registry, who())
        version = registry.version(number) if number else version_to_judge(registry, CANDIDATE, CHAMPION)
        if not version.servable:
            raise UserError(f"{version}: {what_it_is(version)} is not judged; see `twinloop status`")
        context, data = ready_data(context, recipe)
        report = judge_version(context, recipe.evaluate, runtime, rules, version=version.version, data=data)
    print(f"{version}\n{report.text()}")
    return 0 if report.decision == "SHIP" else 1


def show_plan(project: Path, recipe_path: Path) -> int:
    """What each stage takes, from a few steps of it; the data and what they need is made, and kept for `run`."""
    from twinloop.flows.display import make_display
    from twinloop.flows.gpu import gpu_slot
    from twinloop.tasks.base_source import resolve_models
    from twinloop.tasks.context import Context
    from twinloop.tasks.plan import make_plan
    from twinloop.tasks.prepare import ready_data
    from twinloop.tasks.recipe import load_recipe
    from twinloop.tasks.space import run_bytes

    recipe = load_recipe(recipe_path, project)
    base, named = resolve_models(recipe, project)
    runtime = recipe.runtime()
    with make_display() as display, gpu_slot(project, runtime, shared=False):
        context = Context.of(project, recipe_path, recipe, display)
        context, data = ready_data(context, recipe)
        plan = make_plan(context, recipe, base, runtime, data=data, named=named)
        read = [model.config for models in named.values() for model in models.values()]
        written = run_bytes(recipe, plan.config, project, read=read)
        _print_plan(plan, recipe, runtime, written, display.console)
    return 0


def _print_plan(plan: Plan, recipe: Recipe, runtime: Runtime, written: int, console: Console) -> None:
    """written: bytes that a run writes to disk."""
    from rich.table import Table

    network = plan.config
    console.print(
        f"\n{recipe.name}: {network.num_parameters:,} parameters ({network.num_hidden_layers} layers, width "
        f"{network.hidden_size}, {network.num_attention_heads} heads over {network.num_key_value_heads}, vocabulary "
        f"{network.vocab_size}), on {runtime.device} with {runtime.threads} threads",
        soft_wrap=True,
    )
    training = Table(box=None, pad_edge=False, title="training", title_justify="left")
    training.add_column("stage")
    for head in ("steps", "tokens", "TFLOP", "time"):
        training.add_column(head, justify="right")
    for stage in plan.stages:
        numbers = (f"{stage.steps:,}", f"{stage.tokens:,}", f"{stage.flops / 1e12:,.1f}", f"{stage.seconds:,.0f} s")
        training.add_row(stage.name, *numbers)
    memory = {stage.name: stage.memory.rows() for stage in plan.stages}
    console.print(training)
    for stage in plan.stages:
        if stage.answers:
            console.print(f"{stage.name}: {stage.answers}.", soft_wrap=True)
    console.print(_memory_table("memory of training, MiB", "stage", memory))
    serving = {str(precision): memory.rows() for precision, memory in plan.serving.items()}
    console.print(_memory_table("memory of serving, MiB", "precision", serving))
    length = network.max_position_embeddings
    console.print(
        f"{recipe.evaluate.slots} slots of {length} tokens. Weights, gradients, optimizer state and "
        "cache are exact, activations and buffers estimated; the libraries themselves come on top. A run writes about "
        f"{written / 2**20:,.0f} MiB to disk. Times are of a few "
        "steps of each stage on this machine now; export, measurements and gate come on top.",
        soft_wrap=True,
    )
    if plan.busy:
        console.print(
            f"! other processes used {plan.busy_cores:.1f} cores meanwhile: on an idle machine it takes less time",
            style="yellow",
            soft_wrap=True,
        )


def _memory_table(title: str, first: str, rows: Mapping[str, list[tuple[str, int]]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column(first)
    for name, _ in next(iter(rows.values())):
        table.add_column(name, justify="right")
    for name, parts in rows.items():
        table.add_row(name, *(f"{size / 2**20:,.1f}" for _, size in parts))
    return table
