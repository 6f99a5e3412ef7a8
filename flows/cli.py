"""The `twinloop` command. Every mistake of its user is one line on stderr and exit code 2.

Only typer is imported here, and every library inside the sub-command that needs it: `--help` answers in under 0.3 s.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from twinloop.common.errors import UserError
from twinloop.flows.edge import MISTAKE, run_command
from twinloop.flows.environment import prepare_environment, quiet_prefect

DEFAULT_RECIPE = Path("recipes/returns.yaml")

app = typer.Typer(
    help="Own a specialised language model from data to served answers, and back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
documents_app = typer.Typer(help="The documents that answers are given under.", no_args_is_help=True)
data_app = typer.Typer(help="The data set and its version.", no_args_is_help=True)
app.add_typer(documents_app, name="documents")
app.add_typer(data_app, name="data")

RecipePath = Annotated[Path, typer.Argument(help="a recipe file", metavar="RECIPE")]
ModelName = Annotated[str, typer.Option("--model", help="registered model: a recipe's name")]


@app.command()
def run(recipe: RecipePath = DEFAULT_RECIPE) -> int:
    """Run a recipe: from data to a gated, promoted, answering model. Exit code 0 only when the gate says SHIP."""
    from twinloop.tasks.recipe import load_recipe

    load_recipe(recipe)  # a mistake is told before anything starts
    quiet_prefect()
    project = _project()
    from twinloop.flows.run import run_lifecycle

    return run_lifecycle(project, recipe)


@app.command()
def status(
    model: ModelName = "returns", as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False
) -> int:
    """Show the champion, the candidate, the previous champion, the last gate, and where they come from."""
    from twinloop.flows.status import show_status

    return show_status(_project(), model, as_json=as_json)


@app.command()
def serve(
    model: ModelName = "returns",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one")] = 8080,
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to the network")] = "127.0.0.1",
    slots: Annotated[int, typer.Option(min=1, max=1024, help="answers generated at the same time")] = 8,
) -> int:
    """Serve the champion over HTTP."""
    from twinloop.flows.answer import serve_champion

    return serve_champion(_project(), model, host=host, port=port, slots=slots)


@app.command()
def decide(
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="REQUEST", help="the body of POST /v1/decisions; - reads stdin")
    ] = None,
    model: ModelName = "returns",
) -> int:
    """Answer one request with the champion; the answer is JSON. Exit code 1 when it is escalated."""
    from twinloop.flows.answer import decide_once

    return decide_once(_project(), model, as_json)


@app.command()
def gate(
    recipe: RecipePath = DEFAULT_RECIPE,
    version: Annotated[int | None, typer.Option(min=1, help="by default the candidate, or else the champion")] = None,
) -> int:
    """Measure a version here and now, and judge it. Promotes nothing; exit code 1 on BLOCK."""
    from twinloop.flows.status import judge_now

    return judge_now(_project(), recipe, version)


@app.command()
def promote(version: Annotated[int, typer.Argument(min=1)], model: ModelName = "returns") -> int:
    """Make a version that the gate let through the champion."""
    from twinloop.flows.status import promote_version

    return promote_version(_project(), model, version)


@app.command()
def rollback(model: ModelName = "returns") -> int:
    """Make the previous champion the champion again, once it was seen to load and answer."""
    from twinloop.flows.status import roll_back

    return roll_back(_project(), model)


@app.command()
def plan(recipe: RecipePath = DEFAULT_RECIPE) -> int:
    """Estimate memory and compute of a recipe, stage by stage, before running it."""
    from twinloop.flows.status import show_plan

    return show_plan(_project(), recipe)


@documents_app.command("put")
def documents_put(
    document_id: Annotated[str, typer.Argument(help="its name in answers, such as P-7")],
    text: Annotated[str, typer.Argument(help="the text; - reads stdin")],
    model: ModelName = "returns",
) -> int:
    """Make a text the document's newest version; running servers answer under it from the next request on."""
    from twinloop.flows.documents import put_document

    return put_document(_project(), model, document_id, text)


@documents_app.command("list")
def documents_list(model: ModelName = "returns") -> int:
    """List the newest version of each document."""
    from twinloop.flows.documents import list_documents

    return list_documents(_project(), model)


@documents_app.command("history")
def documents_history(document_id: Annotated[str, typer.Argument()], model: ModelName = "returns") -> int:
    """List every version of a document, oldest first, and when it was put."""
    from twinloop.flows.documents import show_history

    return show_history(_project(), model, document_id)


@data_app.command("build")
def data_build() -> int:
    """Bring data/ to the version that params.yaml and the generator stand for."""
    from twinloop.records.dataset import build_data

    version = build_data(_project())
    typer.echo(f"{version.path}: {version.md5}")
    return 0


@data_app.command("check")
def data_check() -> int:
    """Check every byte of data/ against its version."""
    from twinloop.records.dataset import check_data

    version = check_data(_project())
    typer.echo(f"{version.path}: {version.md5}, as data.dvc says")
    return 0


def _project() -> Path:
    from twinloop.tasks.context import find_project

    project = find_project()
    prepare_environment(project)
    return project


def main() -> None:
    """The console command."""
    prepare_environment()
    sys.exit(run_command(_command))


def _command() -> int | None:
    try:
        code: int | None = app(standalone_mode=False)
    except TyperException as error:
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message)
            return MISTAKE
        raise UserError(f"{message} See `twinloop --help`.") from None
    return code


if __name__ == "__main__":
    main()
