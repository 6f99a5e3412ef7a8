"""What commands name: the project that they run in, a recipe of it, a model of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinloop.flows.environment import prepare_environment

RecipePath = Annotated[
    Path | None, typer.Argument(help="a recipe file; by default params.yaml names it", metavar="RECIPE")
]
DataFolder = Annotated[
    Path, typer.Argument(help="as `data` of a recipe; by default the project", metavar="FOLDER", show_default=False)
]
ModelName = Annotated[str | None, typer.Option("--model", help="registered model; by default that of the recipe")]


def project(otherwise: str | None = None) -> Path:
    """The project that the command runs in, its environment prepared. otherwise: as `find_project`."""
    from twinloop.tasks.context import find_project

    found = find_project(otherwise=otherwise)
    prepare_environment(found)
    return found


def recipe(project: Path, named: Path | None) -> Path:
    """The recipe that was named, or the project's own."""
    from twinloop.tasks.recipe import default_recipe

    return named or default_recipe(project)


def model(project: Path, named: str | None) -> str:
    """The model that was named, or that of the project's recipe. Raises UserError for one that there is not."""
    from twinloop.tasks.recipe import default_model

    if named is None:
        return default_model(project)
    from twinloop.flows.status import check_model

    check_model(project, named)
    return named
