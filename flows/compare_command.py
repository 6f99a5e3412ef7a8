"""`twinloop compare`, as the command line has it."""

from __future__ import annotations

from typing import Annotated

import typer

from twinloop.common.errors import UserError
from twinloop.flows.named import ModelName, project, recipe

JUDGES = ("person", "page", "verifier")


def compare(
    versions: Annotated[
        list[str], typer.Argument(metavar="A B [C ...]", help="versions, by number or alias, or model directories")
    ],
    judge: Annotated[
        str, typer.Option(help="person: in the terminal; page: in a browser; verifier: the domain's own")
    ] = "person",
    cases: Annotated[int | None, typer.Option(min=1, help="ask about so many cases; by default all")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the page; 0 takes any free one")] = 0,
    model: ModelName = None,
    as_json: Annotated[bool, typer.Option("--json", help="the ratings, for programs")] = False,
) -> int:
    """Rate versions by which of their answers to the same cases are preferred.

    Each answers the cases; two answers at a time are shown, and not whose they are. What was judged is kept in
    state/judgements/ at once: stopped at any moment, the same command goes on. At the end each version has its rating
    (Bradley-Terry) with a 95% interval, and it is said how many more judgements make the order certain at 95%.
    """
    from twinloop.flows.compare import compare_models
    from twinloop.tasks.recipe import recipe_path_of

    if judge not in JUDGES:
        raise UserError(f"--judge {judge}: choose one of {', '.join(JUDGES)}")
    here = project()
    path = recipe_path_of(model, here) if model else recipe(here, None)
    return compare_models(here, path, versions, judge=judge, limit=cases, port=port, as_json=as_json)
