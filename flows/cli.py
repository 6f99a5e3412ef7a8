"""The `twinloop` command. Every mistake of its user is one line on stderr and exit code 2.

Only typer is imported here, and every library inside the sub-command that needs it: `--help` answers in under 0.3 s.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from twinloop.common.errors import UserError
from twinloop.flows.compare_command import compare
from twinloop.flows.edge import MISTAKE, run_command
from twinloop.flows.environment import prepare_environment, quiet_prefect
from twinloop.flows.named import DataFolder, ModelName, RecipePath
from twinloop.flows.named import model as _model
from twinloop.flows.named import project as _project
from twinloop.flows.named import recipe as _recipe

app = typer.Typer(
    help="Own a specialised language model from data to served answers, and back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
documents_app = typer.Typer(help="The documents that answers are based on.", no_args_is_help=True)
keys_app = typer.Typer(help="The API keys of the project's servers.", no_args_is_help=True)
data_app = typer.Typer(help="The data set and its version.", no_args_is_help=True)
app.add_typer(documents_app, name="documents")
app.add_typer(keys_app, name="keys")
app.add_typer(data_app, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        from twinloop.flows.version import version_text

        typer.echo(version_text())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and leave")
    ] = False,
) -> None:
    """Own a specialised language model from data to served answers, and back."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="a new or empty folder; its name is the model's", metavar="DIR")],
    domain: Annotated[str, typer.Option(help="classification, chat, reasoning or returns")] = "classification",
) -> int:
    """Write a project that runs as it is: recipe, gate rules, task and example data."""
    from twinloop.flows.init import init_project

    name = init_project(folder, domain)
    typer.echo(f"{name}: written; `twinloop run` in '{folder}' trains, judges and serves it")
    return 0


@app.command()
def run(recipe: RecipePath = None) -> int:
    """Run a recipe: from data to a gated, promoted, answering model. Exit code 0 only when the gate says SHIP."""
    from twinloop.tasks.base_source import resolve_models
    from twinloop.tasks.recipe import load_recipe

    project = _project()
    path = _recipe(project, recipe)
    resolve_models(load_recipe(path, project), project)  # a mistake is reported before anything starts
    quiet_prefect()
    from twinloop.flows.run import run_lifecycle

    return run_lifecycle(project, path)


@app.command()
def status(
    model: ModelName = None, as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False
) -> int:
    """Show the champion, the candidate, the previous champion, the last gate, and where they come from."""
    from twinloop.flows.status import show_status

    project = _project()
    return show_status(project, _model(project, model), as_json=as_json)


@app.command()
def serve(
    model: ModelName = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one")] = 8080,
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to the network")] = "127.0.0.1",
    slots: Annotated[int, typer.Option(min=1, max=1024, help="answers that a process generates at the same time")] = 8,
    adapters: Annotated[int, typer.Option(min=0, max=1024, help="other versions that a process has in memory")] = 8,
    workers: Annotated[
        int, typer.Option(envvar="TWINLOOP_WORKERS", min=1, max=64, help="processes, each with a model and slots")
    ] = 1,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="TWINLOOP_CORS_ORIGINS",
            metavar="ORIGIN",
            help="let web pages of this origin ask, such as https://shop.example; may be repeated",
        ),
    ] = None,
    deadline: Annotated[
        float,
        typer.Option(
            envvar="TWINLOOP_DEADLINE", metavar="SECONDS", min=0.1, help="a request that takes longer is given up"
        ),
    ] = 600,
) -> int:
    """Serve the champion over HTTP."""
    from twinloop.flows.serving import ServeSettings, serve_champion
    from twinloop.serving.access import origin

    project = _project()
    settings = ServeSettings(
        model=_model(project, model),
        host=host,
        port=port,
        slots=slots,
        adapters=adapters,
        workers=workers,
        cors_origins=[origin(each) for each in cors_origin or ()],
        deadline_s=deadline,
    )
    return serve_champion(project, settings)


@app.command()
def decide(
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="REQUEST", help="the body of POST /v1/decisions; - reads stdin")
    ] = None,
    model: ModelName = None,
) -> int:
    """Answer one request with the champion; the answer is JSON. Exit code 1 when it is escalated."""
    from twinloop.flows.answer import decide_once

    project = _project()
    return decide_once(project, _model(project, model), as_json)


@app.command()
def gate(
    recipe: RecipePath = None,
    version: Annotated[int | None, typer.Option(min=1, help="by default the candidate, or else the champion")] = None,
) -> int:
    """Measure a version here and now, and judge it. Promotes nothing; exit code 1 on BLOCK."""
    from twinloop.flows.status import judge_now

    project = _project()
    return judge_now(project, _recipe(project, recipe), version)


@app.command()
def parity(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="a number, or champion, candidate, previous")],
    form: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="merged, fp32, fp16, bf16, int8, int4, gguf or llama.cpp; may be repeated. "
            "By default all that the release has and all that have a limit",
        ),
    ] = None,
    model: ModelName = None,
    as_json: Annotated[bool, typer.Option("--json", help="the report, for programs")] = False,
) -> int:
    """Compare every form of a release with the trained network. Exit code 1 where a limit is broken.

    The same prompts, of the evaluation cases, go through the network and through each form that it was released in. A
    line a form says: the share of greedy tokens alike; the largest difference of a logit; how many prompts get an
    answer with another verdict, how many other token ids (tokenizer, template); whether its stop token is the trained
    one; and how many of its answers end with it. Limits are under `parity` in the gate rules. A form that is not in
    the registry is exported for the comparison; what was measured of the same bytes before is not measured again.
    """
    from twinloop.flows.parity import show_parity
    from twinloop.tasks.recipe import recipe_path_of

    project = _project()
    path = recipe_path_of(model, project) if model else _recipe(project, None)
    return show_parity(project, path, version, form or [], as_json=as_json)


app.command()(compare)


@app.command()
def promote(version: Annotated[int, typer.Argument(min=1)], model: ModelName = None) -> int:
    """Make a version that passed the gate the champion."""
    from twinloop.flows.status import promote_version

    project = _project()
    return promote_version(project, _model(project, model), version)


@app.command()
def rollback(model: ModelName = None) -> int:
    """Make the previous champion the champion again, once it was seen to load and answer."""
    from twinloop.flows.status import roll_back

    project = _project()
    return roll_back(project, _model(project, model))


@app.command()
def report(
    version: Annotated[int | None, typer.Argument(min=1, help="by default the champion, or else the candidate")] = None,
    model: ModelName = None,
) -> int:
    """Write the report of a version: one HTML page, and a model card in Markdown."""
    from twinloop.flows.status import write_version_report

    project = _project()
    return write_version_report(project, _model(project, model), version)


@app.command()
def export(
    version: Annotated[str, typer.Argument(help="a number, or an alias such as champion")],
    directory: Annotated[Path, typer.Argument(help="a new or empty folder", metavar="DIR")],
    to: Annotated[str, typer.Option(help="huggingface, gguf, genai or peft")],
    type: Annotated[
        str | None, typer.Option(help="of the weights: f32, f16 or bf16; of a GGUF file also q8_0 or q4_0")
    ] = None,
    model: ModelName = None,
) -> int:
    """Write a version for other tools, once it is seen to choose the same tokens there."""
    from twinloop.flows.status import export_version

    project = _project()
    return export_version(project, _model(project, model), version, to, directory, type=type)


@app.command()
def plan(
    recipe: RecipePath = None,
    budget: Annotated[str | None, typer.Option(help="time (2h), FLOPs (3e15) or tokens (5M) of pretraining")] = None,
    run_tokens: Annotated[
        str | None, typer.Option(help="with --budget: of the longest small run, 1M by default")
    ] = None,
) -> int:
    """Estimate memory and compute of a recipe, stage by stage, before running it.

    With --budget: the size and the tokens that get most out of it, by a scaling law fitted on small runs.
    """
    from twinloop.flows.scaling import show_scaling
    from twinloop.flows.status import show_plan

    project = _project()
    path = _recipe(project, recipe)
    if budget is not None:
        return show_scaling(project, path, budget, run_tokens or "1M")
    if run_tokens is not None:
        raise UserError("plan: --run-tokens is for the small runs of --budget; name a budget too")
    return show_plan(project, path)


@documents_app.command("put")
def documents_put(
    document_id: Annotated[str, typer.Argument(help="its name in answers, such as P-7")],
    text: Annotated[str, typer.Argument(help="the text; - reads stdin")],
    model: ModelName = None,
) -> int:
    """Make a text the document's newest version; running servers use it from the next request on."""
    from twinloop.flows.documents import put_document

    project = _project()
    return put_document(project, _model(project, model), document_id, text)


@documents_app.command("list")
def documents_list(model: ModelName = None) -> int:
    """List the newest version of each document."""
    from twinloop.flows.documents import list_documents

    project = _project()
    return list_documents(project, _model(project, model))


@documents_app.command("history")
def documents_history(document_id: Annotated[str, typer.Argument()], model: ModelName = None) -> int:
    """List every version of a document, oldest first, and when it was put."""
    from twinloop.flows.documents import show_history

    project = _project()
    return show_history(project, _model(project, model), document_id)


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="whose it is, such as shop")],
    requests: Annotated[int | None, typer.Option(min=1, help="a minute; by default any number")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="read and written a minute; by default any number")] = None,
) -> int:
    """Make an API key and print it, this once. From the first one on, servers answer nobody without a key."""
    from twinloop.flows.keys import create_key

    return create_key(_project(), name, requests_per_minute=requests, tokens_per_minute=tokens)


@keys_app.command("list")
def keys_list() -> int:
    """List the keys: names, when they were made, limits."""
    from twinloop.flows.keys import list_keys

    return list_keys(_project())


@keys_app.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument()]) -> int:
    """End a key: running servers refuse it from the next request on."""
    from twinloop.flows.keys import revoke_key

    return revoke_key(_project(), name)


@data_app.command("build")
def data_build(folder: DataFolder = Path()) -> int:
    """Bring data/ to the version of params.yaml and the generator."""
    from twinloop.records.dataset import build_data

    version = build_data(_project() / folder)
    typer.echo(f"{version.path}: {version.md5}")
    return 0


@data_app.command("check")
def data_check(folder: DataFolder = Path()) -> int:
    """Check every byte of data/ against its version."""
    from twinloop.records.dataset import check_data

    version = check_data(_project() / folder)
    typer.echo(f"{version.path}: {version.md5}, as in data.dvc")
    return 0


@data_app.command("schema")
def data_schema(
    kind: Annotated[str | None, typer.Argument(help="a record type such as chat; by default all")] = None,
    domain: Annotated[
        str | None, typer.Option(help="as in a recipe, such as returns or ./tickets.py; by default the recipe's")
    ] = None,
) -> int:
    """Show what a row of each data file must be: fields, types, meaning, and a whole example row."""
    from twinloop.flows.schema import data_schema, named_domain, recipes_domain

    project = Path.cwd() if domain else _project("name a domain, such as --domain returns")
    domain = domain or recipes_domain(_recipe(project, None), project)
    typer.echo(data_schema(named_domain(domain, project), kind))
    return 0


def main() -> None:
    """The console command."""
    prepare_environment()
    code = run_command(_command)
    gc.freeze()  # or the interpreter looks through 600,000 objects at its end, 1.3 s of CPU after a run
    sys.exit(code)


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
