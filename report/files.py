"""The story as files of the project: the report, and the results that `dvc metrics` and `dvc plots` compare.

    reports/<model>-<version>.html, .md       the report of a version; not in git, made again by `twinloop report`
    results/metrics/<model>.json              numbers of the last lifecycle of this model
    results/plots/<model>/<stage>/<metric>.csv  curves and rates, one file each

`results/` is for git, by DVC's own convention: `dvc metrics diff` compares what lies there with what was committed.
Nothing reads it but people and DVC; a lifecycle writes it anew, and no code version counts it as a change.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from twinloop.common.files import write_whole
from twinloop.report.drawing import Panel
from twinloop.report.pages import html_page, model_card
from twinloop.report.story import Story
from twinloop.report.tracked import final_metrics

REPORTS, RESULTS = "reports", "results"
COMPARED = ("pass_rate", "bits_per_byte", "answer_perplexity")
"""Of each stage."""
TIMES = {"seconds"}
"""Of the machine on that day, not of the model."""


def write_report(project: Path, story: Story, panels: Mapping[str, Sequence[Panel]]) -> list[Path]:
    """The page and the card of a version."""
    folder = project / REPORTS
    folder.mkdir(exist_ok=True)
    name = f"{story.model}-{story.version}"
    pages = {folder / f"{name}.html": html_page(story, panels), folder / f"{name}.md": model_card(story)}
    for path, text in pages.items():
        write_whole(path, text.encode())
    return list(pages)


def write_results(project: Path, story: Story) -> None:
    """Replace what lies in results/ of this model."""
    metrics = project / RESULTS / "metrics" / f"{story.model}.json"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    stages = {
        name: {key: measured.metrics[key] for key in COMPARED if key in measured.metrics}
        for name, measured in story.measured
    }
    numbers = {name: round(value, 6) for name, value in sorted(final_metrics(story).items()) if name not in TIMES}
    content = {"gate": story.gate.decision, "stages": stages, **_nested(numbers)}
    write_whole(metrics, (json.dumps(content, indent=1) + "\n").encode())
    plots = project / RESULTS / "plots" / story.model
    shutil.rmtree(plots, ignore_errors=True)
    for stage in story.stages:
        for name, curve in stage.curves.items():
            _write(plots / _plain(stage.name) / f"{_plain(name)}.csv", ("step", _plain(name)), curve)


def _nested(numbers: Mapping[str, float]) -> dict[str, object]:
    """`kind/golden` as {"kind": {"golden": ...}}: DVC's tables then group them."""
    found: dict[str, object] = {}
    for name, value in numbers.items():
        group, _, rest = name.partition("/")
        if rest:
            inner = found.setdefault(group, {})
            assert isinstance(inner, dict)
            inner[rest] = value
        else:
            found[name] = value
    return found


def _plain(name: str) -> str:
    """As a file's name."""
    return re.sub(r"[^\w.-]+", "-", name)


def _write(path: Path, head: Iterable[str], rows: Iterable[Sequence[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *([step, f"{value:.6g}"] for step, value in rows)])
    write_whole(path, out.getvalue().encode())
