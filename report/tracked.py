"""The story in MLflow: figures, tables, numbers and the report as artifacts of the lifecycle's run, and read back."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from twinloop.common.errors import UserError
from twinloop.evaluation.parity_report import LIMITED, ParityReport
from twinloop.registry.tracking import Mlruns, Tracker
from twinloop.report.kept import Figures
from twinloop.report.pages import prompt_text
from twinloop.report.story import Story

if TYPE_CHECKING:
    from mlflow.entities import Run

STORY = "story.json"
VERSION, GATE = "twinloop.version", "gate"
"""Tags of a lifecycle's run: the version that it registered, and the gate's decision."""


def log_story(tracker: Tracker, story: Story, figures: Figures, report: Sequence[Path]) -> None:
    """Everything of the story, in the run of `tracker`. report: the files of the report page."""
    client, run_id = tracker.mlruns.client, tracker.run_id
    with tempfile.TemporaryDirectory() as folder:
        for name in figures.panels:
            place = Path(folder, "figures", f"{name}.png")
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(figures.png(name))
        Path(folder, STORY).write_text(story.model_dump_json(indent=1))
        for path in report:
            Path(folder, f"report{path.suffix}").write_bytes(path.read_bytes())
        client.log_artifacts(run_id, folder)
    for name, columns in tables(story).items():
        if columns:
            client.log_table(run_id, columns, f"tables/{name}.json")
    tracker.log(final_metrics(story))
    tracker.tag({VERSION: str(story.version), GATE: story.gate.decision, "mlflow.note.content": description(story)})
    for stage in story.stages:
        if stage.run_id and stage.version and not stage.reused:
            name = f"{stage.name} (version {stage.version})"
            client.update_run(stage.run_id, name=name)


def final_metrics(story: Story) -> dict[str, float]:
    """What the lifecycle came to, as numbers: the evaluation, the parity of each form, the gate."""
    found = dict(story.evaluation.metrics) if story.evaluation else {}
    served = next((stage for stage in story.stages if stage.name.startswith("export")), None)
    found |= {f"export/{name}": value for name, value in served.metrics.items()} if served else {}
    found |= {f"parity/{name}": value for name, value in story.parity.metrics().items()} if story.parity else {}
    found |= {f"gate/{check.rule}": check.measured for check in story.gate.checks if check.measured is not None}
    seconds = sum(stage.seconds or 0 for stage in story.stages if not stage.reused)
    return found | {"shipped": float(story.gate.decision == "SHIP"), "seconds": seconds}


def tables(story: Story) -> dict[str, dict[str, list[Any]]]:
    """Columns by the table's name."""
    stages = [
        {
            "stage": stage.name,
            "made": "before" if stage.reused else "by this lifecycle",
            "seconds": None if stage.seconds is None else round(stage.seconds, 1),
            "version": stage.version,
            "mlflow run": stage.run_id or "",
            "content": stage.digest or "",
            "read": ", ".join(stage.inputs),
            "pass rate": stage.measured.overall.rate if stage.measured and stage.measured.overall.total else None,
            "note": stage.note,
        }
        for stage in story.stages
    ]
    gate = [
        {
            "outcome": check.outcome,
            "rule": check.rule,
            "measured": check.measured,
            "limit": f"{check.bound} {check.limit:g}",
            "detail": check.detail,
            "owner": next((reason.owner for reason in story.gate.reasons if reason.rule == check.rule), ""),
        }
        for check in story.gate.checks
    ]
    failures = [
        {
            "case": failure.case_id,
            "kind": failure.kind,
            "prompt": prompt_text(failure.prompt),
            "output": failure.output,
            "expected": str(failure.expected or ""),
            "failed checks": ", ".join(failure.failed),
            "reasons": "; ".join(failure.reasons),
            "owner": failure.owner,
            "next": failure.next_action,
        }
        for failure in story.failures
    ]
    rates = [
        {"stage": stage, "of": of, "name": name, "rate": rate.rate, "low": rate.interval[0], "high": rate.interval[1]}
        for stage, measured in story.measured
        for of, named in (
            ("cases", {"all": measured.overall}),
            ("kind", measured.by_kind),
            ("predicate", measured.by_predicate),
        )
        for name, rate in named.items()
        if rate.total
    ]
    metrics = [
        {
            "stage": stage,
            "name": name,
            "title": story.task.metrics.get(name, name),
            "value": estimate.value,
            "low": estimate.interval[0] if estimate.interval else None,
            "high": estimate.interval[1] if estimate.interval else None,
        }
        for stage, measured in story.measured
        for name, estimate in measured.measured.items()
    ]
    found: dict[str, Sequence[Mapping[str, Any]]] = {
        "stages": stages,
        "forms": _forms(story.parity) if story.parity else [],
        "gate": gate,
        "failures": failures,
        "rates": rates,
        "metrics": metrics,
    }
    for stage, measured in story.measured:
        found[f"samples_{stage}"] = [
            {
                "case": sample.case_id,
                "kind": sample.kind,
                "prompt": prompt_text(sample.prompt),
                "output": sample.output,
                "passed": "" if sample.passed is None else str(sample.passed),
                "expected": str(sample.expected or ""),
            }
            for sample in measured.samples
        ]
    return {name: _columns(rows) for name, rows in found.items()}


def _forms(parity: ParityReport) -> list[dict[str, Any]]:
    rows = [
        {
            "form": form.form,
            "content": form.digest,
            **{name: getattr(form, name) for name in LIMITED},
            "compared tokens": form.compared,
            "differs": "; ".join(problem for some in form.problems.values() for problem in some),
        }
        for form in parity.forms
    ]
    nothing = dict.fromkeys(rows[0], None)
    return rows + [{**nothing, "form": form, "differs": f"not compared: {why}"} for form, why in parity.missing.items()]


def description(story: Story) -> str:
    """The run's description, in Markdown: MLflow shows it on the run's page, and the links work there."""
    links = [f"[{tool}]({url})" for tool, url in story.pages.items() if tool != "MLflow"]
    lines = [
        f"**{story.model} version {story.version}**: gate {story.gate.decision}. {story.outcome}.",
        " · ".join([*links, "under Artifacts: the report, figures, and failures, samples and stages as tables"]),
        "",
        "| stage | made | run | pass rate |",
        "|---|---|---|---|",
    ]
    for stage in story.stages:
        page = f"#/experiments/{story.mlflow_experiment}/runs/{stage.run_id}"
        run = f"[{stage.run_id[:8]}]({page})" if stage.run_id else ""
        rate = str(stage.measured.overall) if stage.measured and stage.measured.overall.total else ""
        made = "before, verified now" if stage.reused else "by this lifecycle"
        lines.append(f"| {stage.name} | {made} | {run} | {rate} |")
    return "\n".join(lines)


def read_story(mlruns: Mlruns, model: str, version: int) -> Story:
    """The story of the last lifecycle that came to this version. Raises UserError where MLflow has none."""
    client = mlruns.client
    of_version = f"tags.`twinloop.recipe` = '{model}' and tags.`{VERSION}` = '{version}'"
    experiments = [each.experiment_id for each in client.search_experiments()]  # those of a moved project too
    for run in client.search_runs(experiments, of_version, order_by=["attributes.start_time DESC"]):
        if story := _story_of(mlruns, run):
            return story
    raise UserError(
        f"{model} version {version}: MLflow holds no lifecycle that came to it, and a report is made from one; name a "
        "version that a lifecycle exported and judged (a checkpoint is in that version's report), or `twinloop run`"
    )


def _story_of(mlruns: Mlruns, run: Run) -> Story | None:
    """None where its file is gone, or is of another version of this program."""
    from mlflow.exceptions import MlflowException

    run_id, model = run.info.run_id, run.data.tags["twinloop.recipe"]
    here = mlruns.root / "artifacts" / model / run_id / "artifacts" / STORY  # MLflow's own path is that before a move
    try:
        path = here if here.exists() else Path(mlruns.client.download_artifacts(run_id, STORY))
        return Story.model_validate_json(path.read_bytes())
    except (OSError, MlflowException, ValidationError):
        return None


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
