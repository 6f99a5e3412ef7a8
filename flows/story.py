"""The story of a lifecycle where people look: its own MLflow run, Prefect's artifacts, the report, DVC's results."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from twinloop.common.errors import is_disk_full, one_line
from twinloop.flows.outcome import Outcome
from twinloop.flows.progress import artifact_key
from twinloop.flows.server import has_shared_server
from twinloop.flows.services import Ports
from twinloop.registry.tracking import Execution, Tracker
from twinloop.report.gather import Ending, LifecycleRun, gather
from twinloop.tasks.context import Context
from twinloop.tasks.recipe import Recipe

if TYPE_CHECKING:
    from prefect.client.schemas import FlowRun

    from twinloop.report.kept import Figures
    from twinloop.report.story import Story

log = logging.getLogger(__name__)

MODEL_TRAINING = "workflowType=machine_learning"
"""In an address of MLflow's pages (3.17): without it they are those for prompts, and a run is an evaluation there."""


@dataclass(frozen=True)
class Tracked:
    """A lifecycle that is under way, and its MLflow run. context: its stages are nested under that run."""

    context: Context
    tracker: Tracker
    run: LifecycleRun


@contextmanager
def tracked_lifecycle(context: Context, recipe: Recipe) -> Iterator[Tracked]:
    """Meanwhile, the lifecycle has a run of its own in MLflow, linked with Prefect's. It ends as the body does."""
    flow_run = _flow_run()
    now = datetime.now().astimezone()
    title = f"{context.recipe} {now:%Y-%m-%d %H:%M}"
    ports = Ports.from_environment()
    execution = Execution(
        recipe=context.recipe,
        stage="lifecycle",
        key="lifecycle",
        name=title,
        settings=recipe.plain(),
        recipe_path=context.recipe_path,
        dataset=context.dataset,
        code=context.code,
    )
    with Tracker(context.mlruns, execution) as tracker:
        served = os.environ.get("MLFLOW_TRACKING_URI", "")
        base = served if served.startswith("http") else f"http://127.0.0.1:{ports.mlflow}"
        experiment = context.mlruns.experiment_id(context.recipe)
        page = f"{base.rstrip('/')}/#/experiments/{experiment}/runs/{tracker.run_id}"
        pages = {"MLflow": f"{page}?{MODEL_TRAINING}"}
        if flow_run:
            pages["Prefect"] = _flow_page(flow_run, ports)
            tracker.tag({"prefect.flow_run": flow_run.name, "prefect.flow_run_url": pages["Prefect"]})
        create_link_artifact(pages["MLflow"], link_text=f"{title} in MLflow", key="mlflow-run")
        run = LifecycleRun(tracker.run_id, title, f"{now:%Y-%m-%d %H:%M %Z}", pages)
        yield Tracked(context.within(tracker.run_id), tracker, run)


def write_story(tracked: Tracked, context: Context, recipe: Recipe, outcome: Outcome) -> Path | None:
    """Draw and write the story everywhere; the report's page. What fails is a warning: what was made and promoted does
    not depend on it."""
    from twinloop.report.files import write_report
    from twinloop.report.kept import kept_figures

    published, pages = outcome.published, []
    ending = Ending(outcome.gate, published.version, published.promotion is not None, _in_a_line(outcome))
    try:
        story = gather(context, recipe, outcome.rows, ending, tracked.run)
        figures = kept_figures(context.project, story)
        pages = write_report(context.project, story, figures)
        _publish(tracked.tracker, context, story, figures, pages)
        figures.drop_others()
    except Exception as trouble:
        if is_disk_full(trouble):  # that ends the run, and is reported once
            raise
        log.warning("the report is not complete: %s: %s", type(trouble).__name__, one_line(trouble))
    return pages[0] if pages else None


def _publish(tracker: Tracker, context: Context, story: Story, figures: Figures, pages: Sequence[Path]) -> None:
    """To MLflow, DVC's results and Prefect."""
    from twinloop.report.results import write_results
    from twinloop.report.tracked import log_story, tables

    log_story(tracker, story, figures, pages)
    write_results(context.project, story)
    key, shown = artifact_key(story.model), tables(story)
    for name in ("stages", "gate"):
        columns = shown[name]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        create_table_artifact(rows, key=f"{key}-{name}", description=f"{story.title}: {name}")
    card = next(path for path in pages if path.suffix == ".md").read_text()
    create_markdown_artifact(card, key=f"{key}-model-card", description=f"{story.title}: {story.outcome}")


def _in_a_line(outcome: Outcome) -> str:
    published = outcome.published
    if published.promotion:
        return f"{published.version} {'was promoted' if published.moved else 'was the champion already'}"
    return f"{published.version} was not promoted" + (f": {published.error}" if published.error else "")


def _flow_run() -> FlowRun | None:
    from prefect.context import FlowRunContext

    running = FlowRunContext.get()
    return running.flow_run if running else None


def _flow_page(flow_run: FlowRun, ports: Ports) -> str:
    """On the server that the run reports to; one that ends with the run has no pages, and `make up` shows its runs."""
    from prefect.utilities.urls import url_for

    if has_shared_server() and (url := url_for("flow-run", obj_id=flow_run.id)):
        return url
    return f"http://127.0.0.1:{ports.prefect}/runs/flow-run/{flow_run.id}"
