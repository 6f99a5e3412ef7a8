"""`twinloop compare`: versions answer the same cases, somebody prefers answers, and ratings come of it."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinloop.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from twinloop.domains.domain import Domain
    from twinloop.evaluation.comparison import Comparison, Judging, Side, Tally
    from twinloop.tasks.recipe import Recipe

ELO = 400 / 2.302585092994046
"""Points of Elo for each unit of log-odds: 400 points are odds of 10 to 1."""
KEYS: Mapping[str, Side] = {"1": "left", "2": "right", "t": "tie"}
HELP = "1, 2: the better one; t: tie; s: later; u: take back the last one; q: stop for now"
CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")
"""Characters by which an answer would steer the terminal, such as to clear it."""


def compare_models(
    project: Path,
    recipe_path: Path,
    named: Sequence[str],
    *,
    judge: str,
    limit: int | None,
    port: int,
    as_json: bool,
) -> int:
    """judge: person, page or verifier. limit: about so many cases; None: all.

    Raises UserError for a model that there is not, without cases, and for a judge that the domain does not have.
    """
    from twinloop.evaluation.comparison import by_verifier
    from twinloop.flows.display import make_console
    from twinloop.tasks.recipe import load_recipe

    recipe = load_recipe(recipe_path, project)
    # Programs read the ratings alone from stdout.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        comparison, domain = _answered(project, recipe_path, recipe, named, judge, limit)
        if judge == "verifier":
            tally = comparison.tally(by_verifier(domain))
        else:
            kept = project / "state" / "judgements" / f"{recipe.name}.jsonl"
            tally = _judged_by_person(comparison, kept, port if judge == "page" else None)
    if as_json:
        print(json.dumps(ratings(comparison, tally), indent=1))
    else:
        show(comparison, tally, make_console())
    return 0


def _judged_by_person(comparison: Comparison, kept: Path, port: int | None) -> Tally:
    """kept: the file of judgements. port: of the page; None: in the terminal."""
    from twinloop.evaluation.comparison import Judging
    from twinloop.evaluation.judgements import Judgements
    from twinloop.flows.display import make_console
    from twinloop.registry.ledger import who

    with Judgements.opened(kept, who()) as judgements:
        judging = Judging(comparison, judgements)
        if port is None:
            judge_in_terminal(judging, make_console())
        else:
            from twinloop.flows.compare_page import judge_on_page

            judge_on_page(judging, port)
        return judging.tally()


def _answered(
    project: Path, recipe_path: Path, recipe: Recipe, named: Sequence[str], judge: str, limit: int | None
) -> tuple[Comparison, Domain]:
    """The cases with what every model answered to them, and the domain."""
    from twinloop.evaluation.comparison import Comparison, Contestant
    from twinloop.flows.display import make_display
    from twinloop.flows.gpu import gpu_slot
    from twinloop.tasks.compare import answers_stage, find_models, read_compared_cases
    from twinloop.tasks.context import Context
    from twinloop.tasks.prepare import ready_data

    runtime = recipe.runtime()
    with make_display() as display, gpu_slot(project, runtime, shared=False):
        context = Context.of(project, recipe_path, recipe, display)
        if judge == "verifier" and not context.domain.has("verify"):
            raise UserError(
                f"--judge verifier: domain {context.domain.name} has none; judge in the terminal or the page"
            )
        models = find_models(context, named)
        context, data = ready_data(context, recipe)
        cases = read_compared_cases(context, data, limit)
        contestants = [
            Contestant(
                model.name,
                model.digest,
                answers_stage(context, recipe.evaluate, runtime, model=model, cases=cases),
            )
            for model in models
        ]
    return Comparison(cases, contestants), context.domain


def judge_in_terminal(judging: Judging, console: Console) -> None:
    """Ask on stdin until nothing is left, or until the person stops."""
    from twinloop.report.pages import prompt_text

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    say(HELP, "dim")
    while question := judging.question:
        say(f"\n{judging.left} left", "dim")
        say(_visible(prompt_text(question.case.prompt)))
        for number, answer in (("1", question.left), ("2", question.right)):
            say(f"--- answer {number}", "bold")
            say(_visible(answer))
        said = _key(console)
        if said in ("q", ""):
            return
        if said == "s":
            judging.skip()
        elif said == "u":
            judging.take_back()
        else:
            judging.say(KEYS[said])


def _visible(text: str) -> str:
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _key(console: Console) -> str:
    """What was typed; empty at the end of the input."""
    while True:
        console.print("better: ", end="")
        line = sys.stdin.readline()
        said = line.strip().lower()
        if not line or said in (*KEYS, "s", "u", "q"):
            return said
        console.print(HELP, style="dim", markup=False)


def ratings(comparison: Comparison, tally: Tally) -> dict[str, Any]:
    """For programs: points of Elo with their 95% intervals, best first, and what is known of the order."""
    found = tally.ratings
    models = []
    for place in found.order:
        low, high = found.interval(place)
        contestant = comparison.contestants[place]
        models.append(
            {
                "name": contestant.name,
                "digest": contestant.digest,
                "rating": found.strengths[place] * ELO,
                "interval": [low * ELO, high * ELO],
                "preferred": int(tally.preferred[place].sum()),
                "ties": int(tally.ties[place].sum()),
                "not_preferred": int(tally.preferred[:, place].sum()),
                "same_answer": int(tally.same[place].sum()),
            }
        )
    neighbours = list(itertools.pairwise(found.order))
    return {
        "models": models,
        "cases": len(comparison.cases),
        "judgements": tally.judged,
        "left": tally.left,
        "certainty": [found.certainty(better, worse) for better, worse in neighbours],
        "order_certain": found.order_is_certain(),
        "judgements_needed": tally.needed,
    }


def show(comparison: Comparison, tally: Tally, console: Console) -> None:
    from rich.table import Table

    found = ratings(comparison, tally)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for head in ("rating (95% CI)", "preferred", "tie", "not", "same answer"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in found["models"]:
        low, high = each["interval"]
        counts = (each["preferred"], each["ties"], each["not_preferred"], each["same_answer"])
        table.add_row(each["name"], f"{each['rating']:+.0f} ({low:+.0f} to {high:+.0f})", *map(str, counts))
    console.print()
    console.print(table)
    for line in lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def lines(found: dict[str, Any]) -> list[str]:
    """What the ratings say of the order, in words."""
    names = [each["name"] for each in found["models"]]
    said = ["rating: points of Elo; 400 more is preferred ten times as often as not"]
    for (better, worse), certainty in zip(itertools.pairwise(names), found["certainty"], strict=True):
        said.append(f"{better} before {worse}: {certainty:.1%} certain")
    if found["order_certain"]:
        return [*said, "the order is certain at 95%"]
    needed, left = found["judgements_needed"], found["left"]
    if needed is None:
        about = "nothing was judged yet" if not found["judgements"] else "they are too much alike to say how many"
        said.append(f"the order is not certain at 95%: it takes more judgements ({about}); {left} are left to make")
    else:
        more = "" if needed <= left else "; add cases"
        said.append(f"about {needed:,} more judgements make the order certain at 95%; {left:,} are left to make{more}")
    return said
