"""Commands about releases: what is served, checked, promoted, rolled back, and what a recipe would take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import Registry

if TYPE_CHECKING:
    from twinloop.registry.versions import Served

FOLLOW = "running servers follow within seconds"


def show_status(project: Path, model: str, *, as_json: bool) -> int:
    from twinloop.registry.status import status

    found = status(Registry(Mlruns(project / "mlruns"), model))
    print(found.to_json() if as_json else found.to_text())
    return 0


def promote_version(project: Path, model: str, version: int) -> int:
    from twinloop.registry.promotion import promote
    from twinloop.tasks.register import who

    done = promote(Registry(Mlruns(project / "mlruns"), model), version, who=who(), manual=True)
    print(f"{model} version {done.to_version} is the champion (gate report {done.gate_digest}); {FOLLOW}")
    return 0


def roll_back(project: Path, model: str) -> int:
    from twinloop.registry.champion import load_served_domain
    from twinloop.registry.promotion import rollback
    from twinloop.registry.smoke_test import smoke_test
    from twinloop.tasks.register import who

    def test(version: Served) -> None:
        print(f"smoke test: {smoke_test(version.path, load_served_domain(version, project).domain)}")

    done = rollback(Registry(Mlruns(project / "mlruns"), model), who(), test)
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
    from twinloop.registry.promotion import finish_interrupted
    from twinloop.registry.versions import CANDIDATE, CHAMPION
    from twinloop.tasks.context import Context
    from twinloop.tasks.prepare import data_stage, validate_stage
    from twinloop.tasks.recipe import load_recipe
    from twinloop.tasks.register import who
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
            raise UserError(f"{version}: a checkpoint ({version.stage}) is not judged; see `twinloop status`")
        raw, _ = data_stage(context)
        context = context.on_data(raw.md5)
        data = validate_stage(context, recipe.validate_, needed=recipe.record_types, data=raw)
        report = judge_version(context, recipe.evaluate, runtime, rules, version=version.version, data=data)
    print(f"{version}\n{report.text()}")
    return 0 if report.decision == "SHIP" else 1


def show_plan(project: Path, recipe_path: Path) -> int:
    from rich.table import Table

    from twinloop.flows.display import make_console
    from twinloop.tasks.plan import make_plan
    from twinloop.tasks.recipe import load_recipe

    recipe = load_recipe(recipe_path, project)
    runtime = recipe.runtime()
    plan = make_plan(recipe, project, runtime)
    console = make_console()
    network = plan.config
    console.print(
        f"{recipe.name}: {network.num_parameters:,} parameters ({network.num_hidden_layers} layers, width "
        f"{network.hidden_size}, {network.num_attention_heads} heads over {network.num_key_value_heads}, vocabulary "
        f"{network.vocab_size}), on {runtime.device} with {runtime.threads} threads",
        soft_wrap=True,
    )
    training = Table(box=None, pad_edge=False, title="training, MiB", title_justify="left")
    training.add_column("stage")
    for head in [*(name for name, _ in plan.stages[0].memory.rows()), "tokens", "TFLOP", "time"]:
        training.add_column(head, justify="right")
    for stage in plan.stages:
        training.add_row(
            stage.name,
            *(f"{size / 2**20:,.1f}" for _, size in stage.memory.rows()),
            "?" if stage.tokens is None else f"{stage.tokens:,}",
            "?" if stage.flops is None else f"{stage.flops / 1e12:,.1f}",
            "?" if stage.seconds is None else f"~{stage.seconds:,.0f} s",
        )
    serving = Table(box=None, pad_edge=False, title="serving, MiB", title_justify="left")
    serving.add_column("precision")
    for name, _ in next(iter(plan.serving.values())).rows():
        serving.add_column(name, justify="right")
    for precision, memory in plan.serving.items():
        serving.add_row(precision, *(f"{size / 2**20:,.1f}" for _, size in memory.rows()))
    console.print(training)
    console.print(serving)
    console.print(
        f"{recipe.evaluate.slots} slots of {recipe.base.max_length} tokens. Weights, gradients, optimizer state and "
        f"cache are exact; the rest is estimated, time at {plan.flops_per_second / 1e9:.1f} GFLOP/s. "
        "The libraries themselves come on top.",
        soft_wrap=True,
    )
    return 0
