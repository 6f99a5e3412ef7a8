"""`twinloop plan --budget`: a scaling law of the user's own corpus, and what it says about a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from twinloop.evaluation.scaling import Fit, ScalingLaw
    from twinloop.tasks.scaling_plan import ScalingPlan


def show_scaling(project: Path, recipe_path: Path, budget_text: str, run_tokens: str) -> int:
    """Make the small runs, those that are not there yet, fit the law and print what it says."""
    from twinloop.flows.display import make_display
    from twinloop.flows.gpu import gpu_slot
    from twinloop.tasks.context import Context
    from twinloop.tasks.prepare import ready_data
    from twinloop.tasks.recipe import load_recipe
    from twinloop.tasks.scaling import measure_runs, open_corpus, pretraining_of
    from twinloop.tasks.scaling_plan import parse_budget, parse_tokens, plan_budget

    budget, longest = parse_budget(budget_text), parse_tokens(run_tokens)
    recipe = load_recipe(recipe_path, project)
    pretraining_of(recipe)
    runtime = recipe.runtime()
    with make_display() as display, gpu_slot(project, runtime, shared=False):
        context = Context.of(project, recipe_path, recipe, display)
        context, data = ready_data(context, recipe)
        corpus = open_corpus(context, recipe, data=data)
        runs = measure_runs(context, corpus, runtime, longest, enough=budget.check_holds)
        print_plan(plan_budget(corpus, runs, budget), display.console)
    return 0


def print_plan(found: ScalingPlan, console: Console) -> None:
    from rich.table import Table

    law, fit = found.fit.law, found.fit
    title = "\nsmall runs, loss on held-out text in bits a byte"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for head in ("depth", "weights", "tokens", "TFLOP", "time", "loss", "by the law"):
        table.add_column(head, justify="right")
    for each in sorted(found.runs, key=lambda each: (each.depth, each.tokens)):
        spent = (f"{each.flops * each.tokens / 1e12:,.2f}", _time(each.seconds * each.tokens))
        losses = (f"{each.loss:.3f}", f"{law.loss(each.parameters, each.tokens):.3f}")
        table.add_row(f"{each.depth}", f"{each.parameters:,}", f"{each.tokens:,}", *spent, *losses)
    console.print(table)
    constants = ", ".join(f"{name} {_range(fit, value)}" for name, value in CONSTANTS.items())
    formula = f"{law.E:.3g} + {law.A:.3g} / N^{law.alpha:.2f} + {law.B:.3g} / D^{law.beta:.2f}"
    _say(console, f"\nloss(N, D) = {formula}   (N weights, D tokens; Hoffmann et al., 2022)")
    _say(console, f"95%: {constants}; a run's loss varies by {fit.noise:.1%}")
    if checked := found.checked:
        largest, predicted = checked
        _say(
            console,
            f"its largest run, predicted from the others: {predicted:.3f}, reached {largest.loss:.3f} "
            f"({predicted / largest.loss - 1:+.1%})",
        )
    _print_choices(found, console)
    for note in found.notes():
        console.print(f"! {note}", style="yellow", highlight=False, soft_wrap=True)


CONSTANTS: Mapping[str, Callable[[ScalingLaw], float]] = {
    "E": lambda law: law.E,
    "alpha": lambda law: law.alpha,
    "beta": lambda law: law.beta,
}


def _print_choices(found: ScalingPlan, console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=f"\nbudget {found.budget.text}", title_justify="left")
    table.add_column("chosen by")
    for head in ("depth", "weights", "tokens", "TFLOP", "time", "loss (95%)"):
        table.add_column(head, justify="right")
    for name, choice in found.choices.items():
        low, high = found.fit.interval(choice.loss)
        loss = f"{choice.loss(found.fit.law):.3f} ({low:.3f}-{high:.3f})"
        amounts = (f"{choice.size.depth}", f"{choice.size.parameters:,}", f"{choice.tokens:,.0f}")
        table.add_row(name, *amounts, f"{found.flops(choice) / 1e12:,.1f}", _time(found.seconds(choice)), loss)
    console.print(table)
    best = found.choices["best"]
    sizes = f"`depth: {best.size.depth}` (sizes beside it in proportion)"
    _say(console, f"in the recipe: {sizes}, `tokens: {best.tokens:_.0f}`")


def _range(fit: Fit, value: Callable[[ScalingLaw], float]) -> str:
    low, high = fit.interval(value)
    return f"{low:.2f}-{high:.2f}"


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 10 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
