"""The lifecycle from the command line, on Prefect's embedded server or on the one that PREFECT_API_URL names."""

from __future__ import annotations

from pathlib import Path

from models.errors import UserError


def run_lifecycle(project: Path, recipe: Path) -> int:
    """0 on SHIP, 1 on BLOCK. Raises what the flow raised."""
    from flows.lifecycle import lifecycle

    path = recipe.resolve()
    if not path.is_relative_to(project):
        raise UserError(f"{recipe}: lies outside the project in {project}; put it into {project / 'recipes'}")
    outcome = lifecycle(str(path.relative_to(project)))
    return 0 if outcome.shipped else 1
