"""The results of the last lifecycle of a model, for `dvc metrics show|diff` and `dvc plots show|diff`.

    results/<model>/dvc.yaml       which files those are: no stage, so `dvc repro` never touches them
    results/<model>/metrics.json
    results/<model>/plots/...      a CSV file for each curve of training, and for the rates

They are for git, by DVC's convention: `diff` compares them with what was committed. A lifecycle writes them anew, and
`registry.tracking.code_version` counts no change of them. Nothing but DVC and people reads them.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML

from twinloop.common.files import write_whole
from twinloop.registry.tracking import RESULTS
from twinloop.report.figures import axis_of
from twinloop.report.story import Story
from twinloop.report.tracked import final_metrics

COMPARED = ("pass_rate", "bits_per_byte", "answer_perplexity")
"""Of each stage."""
TIMES = {"seconds"}
"""Of the machine on that day, not of the model."""
HEAD = "# Written by `twinloop run`: what `dvc metrics` and `dvc plots` show of the last lifecycle of this model.\n"

Definitions: TypeAlias = list[dict[str, dict[str, Any]]]


def write_results(project: Path, story: Story) -> None:
    """Replace the results of this model."""
    folder = project / RESULTS / story.model
    shutil.rmtree(folder / "plots", ignore_errors=True)
    (folder / "plots").mkdir(parents=True)
    write_whole(folder / "metrics.json", (json.dumps(_metrics(story), indent=1) + "\n").encode())
    definitions = [*_curves(folder, story), *_rates(folder, story), *_outcomes(folder, story)]
    out = io.StringIO(HEAD)
    out.seek(0, io.SEEK_END)
    YAML().dump({"metrics": ["metrics.json"], "plots": definitions}, out)
    write_whole(folder / "dvc.yaml", out.getvalue().encode())


def _metrics(story: Story) -> dict[str, Any]:
    """Nested where a name has a slash: DVC's tables then group them."""
    stages = {
        name: {key: measured.metrics[key] for key in COMPARED if key in measured.metrics}
        for name, measured in story.measured
    }
    found: dict[str, Any] = {"decision": story.gate.decision, "stages": stages}
    for name, value in sorted(final_metrics(story).items()):
        group, _, rest = name.partition("/")
        if name in TIMES:
            continue
        if rest:
            found.setdefault(group, {})[rest] = round(value, 6)
        else:
            found[name] = round(value, 6)
    return found


def _curves(folder: Path, story: Story) -> Definitions:
    found: Definitions = []
    for stage in story.stages:
        for name, curve in stage.curves.items():
            path, column = f"plots/{_plain(stage.name)}/{_plain(name)}.csv", _plain(name)
            _write(folder / path, ("step", column), curve)
            title, unit = axis_of(name)
            axes = {"x": "step", "y": {path: column}, "x_label": "optimizer step", "y_label": unit}
            found.append({f"{stage.name} {name}": {**axes, "title": f"{title} ({stage.name})"}})
    return found


def _rates(folder: Path, story: Story) -> Definitions:
    """Of the cases by stage, of the exported model by kind and by predicate."""
    evaluation = story.evaluation
    if evaluation is None or not evaluation.overall.total:
        return []
    by = {
        "stage": {name: each.overall for name, each in story.measured if each.overall.total},
        "kind": {story.task.kinds.get(name, name): rate for name, rate in evaluation.by_kind.items() if rate.total},
        "predicate": {story.task.predicates[name]: rate for name, rate in evaluation.by_predicate.items()},
    }
    found: Definitions = []
    for what, rates in by.items():
        path = f"plots/rates_by_{what}.csv"
        rows = [(f"{rate.rate:.6g}", *(f"{end:.6g}" for end in rate.interval), name) for name, rate in rates.items()]
        _write(folder / path, ("rate", "low", "high", what), rows)
        axes = {"template": "bar_horizontal", "x": "rate", "y": {path: what}, "x_label": "share of cases"}
        found.append({f"pass rate by {what}": {**axes, "y_label": what, "title": f"Pass rate by {what}"}})
    return found


def _outcomes(folder: Path, story: Story) -> Definitions:
    if not story.outcomes:
        return []
    path = "plots/outcomes.csv"
    pairs = [
        (right, answered) for right, row in story.outcomes.items() for answered in row for _ in range(row[answered])
    ]
    _write(folder / path, ("right", "answered"), pairs)
    axes = {"template": "confusion", "x": "answered", "y": {path: "right"}, "x_label": "answered", "y_label": "right"}
    return [{"outcomes": {**axes, "title": "Right outcome and answered one"}}]


def _plain(name: str) -> str:
    """As the name of a file or a column: DVC reads a dot or a slash as a path."""
    return re.sub(r"[^\w-]+", "_", name)


def _write(path: Path, head: Iterable[str], rows: Iterable[Sequence[float | str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    write_whole(path, out.getvalue().encode())
