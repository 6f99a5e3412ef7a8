"""`twinloop parity`: the same prompts through every form of a release, each beside its limits."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from twinloop.evaluation.gate import Check, GateReport
    from twinloop.evaluation.parity_report import ParityReport
    from twinloop.registry.snapshot import Version
    from twinloop.registry.versions import Registry


def show_parity(project: Path, recipe_path: Path, named: str, forms: Sequence[str], *, as_json: bool) -> int:
    """0 where every limit of these forms holds, 1 where one does not. named: a version by its number or alias. forms:
    by name; none: those of the release, and those that have a limit.

    Raises UserError for a version or form that there is not, and for a form that was asked for and cannot be compared.
    """
    from twinloop.domains.loader import load_domain
    from twinloop.evaluation.gate import judge, load_rules
    from twinloop.evaluation.rules import Measurements
    from twinloop.flows.display import make_console, make_display
    from twinloop.flows.gpu import gpu_slot
    from twinloop.registry.versions import Registry
    from twinloop.tasks.context import Context
    from twinloop.tasks.parity import in_order, parity_stage, read_parity
    from twinloop.tasks.prepare import ready_data
    from twinloop.tasks.recipe import load_recipe
    from twinloop.tasks.release import release_of

    recipe = load_recipe(recipe_path, project)
    rules = load_rules(project / recipe.gate.rules, load_domain(recipe.domain, project).domain)
    runtime = recipe.runtime()
    asked = in_order(forms) if forms else ()
    # Programs read the report alone from stdout.
    aside = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with aside, make_display() as display, gpu_slot(project, runtime, shared=False):
        context = Context.of(project, recipe_path, recipe, display)
        registry = Registry(context.mlruns, context.recipe)
        version = _version(registry, named)
        release = release_of(registry, version)
        if release is None:
            raise UserError(f"{version}: the checkpoint that it was exported from was deleted: nothing to compare with")
        context, data = ready_data(context, recipe)
        wanted = asked or release.forms(rules.forms)
        found = read_parity(parity_stage(context, recipe.evaluate, runtime, data=data, release=release, forms=wanted))
    if lost := next((name for name in found.missing if name in asked), None):
        raise UserError(f"{lost}: cannot be compared: {found.missing[lost]}")
    limited = rules.of_parity(wanted)
    measured = Measurements(parity={form.form: form for form in found.forms}, missing_forms=found.missing)
    verdict = judge(limited, measured, candidate=version.digest) if limited else None
    if as_json:
        print(found.to_json(), end="")
    else:
        console = make_console()
        console.print(f"{version}: {len(found.cases)} prompts through each form, compared with the trained network")
        console.print(_table(found, verdict))
        for line in _lines(found, verdict, str(rules.source)):
            console.print(line, soft_wrap=True, markup=False)
    return 1 if verdict and verdict.decision == "BLOCK" else 0


def _version(registry: Registry, named: str) -> Version:
    """Raises UserError where there is none of this number or alias, and for a version that is no exported model."""
    from twinloop.registry.reconcile import what_it_is

    version = registry.named(named)
    if not version.servable:
        raise UserError(f"{version}: {what_it_is(version)} has no forms; name an exported model, see `twinloop status`")
    return version


def _table(found: ParityReport, verdict: GateReport | None) -> Table:
    """One row a form: what was measured, and in brackets the limit."""
    from rich.table import Table

    from twinloop.evaluation.parity_report import LIMITED

    checks = {check.rule: check for check in verdict.checks} if verdict else {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("form", no_wrap=True)
    for title in LIMITED.values():
        table.add_column(title, justify="right", no_wrap=True)
    for form in found.forms:
        cells = [_cell(field, getattr(form, field), checks.get(f"parity.{form.form}.{field}")) for field in LIMITED]
        table.add_row(form.form, *cells)
    return table


def _cell(field: str, value: float | None, check: Check | None) -> str:
    from twinloop.evaluation.parity_report import show_field

    shown = "-" if value is None else show_field(field, value)
    if check is None:
        return shown
    sign = "≥" if check.bound == "at least" else "≤"
    return f"{shown} ({sign} {check.limit:g}){' !' if check.outcome == 'block' else ''}"


def _lines(found: ParityReport, verdict: GateReport | None, source: str) -> list[str]:
    """What differs, what could not be compared, and what that comes to."""
    lines = [f"  {form.form}: {problem}" for form in found.forms for some in form.problems.values() for problem in some]
    lines += [f"  {name}: not compared: {why}" for name, why in found.missing.items()]
    if verdict is None:
        return [*lines, f"no limits: {source} has none for these forms under `parity`"]
    broken: Mapping[str, str] = {reason.rule: reason.reason for reason in verdict.reasons}
    lines += [f"  BLOCK {rule}: {reason}" for rule, reason in broken.items()]
    return [*lines, f"parity: {f'BLOCK, {len(broken)} limits are broken' if broken else 'every limit holds'}"]
