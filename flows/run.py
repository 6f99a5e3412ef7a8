"""The lifecycle from the command line: on an embedded Prefect server, or on one that runs already."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.flows.interrupt import interruptible
from twinloop.flows.runs import crash_dead_runs, marked_alive
from twinloop.flows.server import embedded_server, wait_until_ready
from twinloop.tasks.recipe import load_recipe


def run_lifecycle(project: Path, recipe: Path) -> int:
    """0 when a champion was promoted and answers, 1 when not, 130 on Ctrl-C. Raises what the flow raised."""
    path = recipe.resolve()
    if not path.is_relative_to(project):
        raise UserError(f"{recipe}: lies outside the project in {project}; put it into {project / 'recipes'}")
    try:
        with interruptible(), embedded_server(project):
            from twinloop.flows.lifecycle import NotShippedError, lifecycle

            wait_until_ready(project)
            crash_dead_runs(project)
            try:
                with marked_alive(project):
                    lifecycle(str(path.relative_to(project)))
            except NotShippedError:
                return 1  # the summary has shown why
    except UserError:
        raise
    except Exception as error:
        with suppress(UserError):  # the recipe may be gone by now
            error.add_note(_space(project, path))  # shown where a disk is full
        raise
    except KeyboardInterrupt:
        print("twinloop: stopped; run it again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _space(project: Path, recipe: Path) -> str:
    from twinloop.tasks.base_source import resolve_models
    from twinloop.tasks.space import run_bytes

    settings = load_recipe(recipe, project)
    base, named = resolve_models(settings, project)
    read = [model.config for models in named.values() for model in models.values()]
    needed = run_bytes(settings, base.config, project, read=read)
    return f"a run of {recipe.relative_to(project)} writes about {needed / 2**20:,.0f} MiB"
