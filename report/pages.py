"""The report of a version: one HTML page that needs nothing else, and a model card in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from twinloop.evaluation.case_report import CaseFailure, CaseSample
from twinloop.evaluation.metrics import Estimate, Rate, percentile
from twinloop.evaluation.parity_report import LIMITED, show_field
from twinloop.registry.tracking import flatten
from twinloop.report.kept import Figures
from twinloop.report.story import Stage, Story

TEMPLATES = Path(__file__).with_name("templates")
MOST_FAILURES = 20
"""Of each owner, on the page: all are in MLflow's table."""
SECTIONS = {
    "rates": ("Pass rates", ("pass_rates",)),
    "training": ("Training", ("training_",)),
    "answers": ("Answers and serving", ("confusion", "reliability", "serving")),
    "lineage": ("Lineage", ("lineage",)),
}
"""Of figures: the title, and how the names of the figures begin."""
SERVED = """\
twinloop serve --model {model}
curl -s http://127.0.0.1:8080/{route} -H 'content-type: application/json' \\
  -d '{body}'"""


@dataclass(frozen=True)
class _Tile:
    name: str
    value: str
    about: str = ""


def html_page(story: Story, figures: Figures) -> str:
    """The page, with all its figures in it."""
    shown = []
    for section, (title, begins) in SECTIONS.items():
        if drawn := [svg for name in figures.panels if name.startswith(begins) for svg in figures.svgs(name)]:
            shown.append((section, title, drawn))
    sections = [("stages", "Stages"), *((name, title) for name, title, _ in shown), ("gate", "Gate")]
    sections += [("forms", "Forms")] if story.parity else []
    sections += [("failures", "Failures"), ("samples", "Samples"), ("data", "Data and recipe"), ("serve", "Serve")]
    return _render("page.html", story, figures=shown, sections=sections)


def model_card(story: Story) -> str:
    """The same without figures and samples, as Markdown."""
    return _render("card.md", story)


def _render(template: str, story: Story, **more: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=template.endswith(".html"), undefined=StrictUndefined
    )
    environment.filters |= {
        "seconds": _seconds,
        "bits": _bits,
        "interval": _interval,
        "percent": _percent,
        "prompt": prompt_text,
        "json": lambda value: json.dumps(value, indent=1, ensure_ascii=False),
        "words": _words,
        "measured": _measured,
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    return environment.get_template(template).render(
        story=story,
        tiles=_tiles(story),
        owners=_owners(story.failures),
        samples=_samples(story),
        metrics=_metrics(story),
        settings=list(flatten(story.recipe).items()),
        serving=_serving(story),
        forms={name: each.title for name, each in LIMITED.items()},
        most_failures=MOST_FAILURES,
        **more,
    )


def prompt_text(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as people read them."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _tiles(story: Story) -> list[_Tile]:
    found: list[_Tile] = []
    if (evaluation := story.evaluation) and evaluation.overall.total:
        rate, (low, high) = evaluation.overall, evaluation.overall.interval
        found.append(_Tile("pass rate", f"{rate.rate:.1%}", f"{low:.1%}–{high:.1%} of {rate.total} cases"))
    exported = next((stage for stage in story.stages if stage.name.startswith("export")), None)
    if exported:
        size = exported.metrics.get("bytes", 0) / 2**20
        precision = exported.name.removeprefix("export ")
        found.append(_Tile("parameters", _short(exported.metrics["parameters"]), f"{precision}, {size:.1f} MiB"))
    if load := story.load:
        found.append(_Tile("first token", f"{percentile(load.ttft_ms, 0.95):.3g} ms", "95th percentile under load"))
        found.append(_Tile("throughput", f"{load.tokens_per_s:,.0f}/s", "tokens of all answers together"))
        found.append(_Tile("memory", f"{load.memory_gib:.2f} GiB", "the most that the server held"))
    rows = sum(file.kept for file in story.data)
    quarantined = sum(file.quarantined for file in story.data)
    found.append(_Tile("data", f"{rows:,} rows", f"{quarantined:,} quarantined"))
    return found


def _owners(failures: Sequence[CaseFailure]) -> list[tuple[str, list[CaseFailure]]]:
    """Failures by the layer that looks at them, most first."""
    by_owner: dict[str, list[CaseFailure]] = {}
    for failure in failures:
        by_owner.setdefault(failure.owner, []).append(failure)
    return sorted(by_owner.items(), key=lambda item: -len(item[1]))


def _samples(story: Story) -> list[tuple[CaseSample, list[tuple[str, CaseSample]]]]:
    """Each sampled case with what every stage answered, one after the other."""
    cases: dict[str, CaseSample] = {}
    answers: dict[str, list[tuple[str, CaseSample]]] = {}
    for stage, measured in story.measured:
        for sample in measured.samples:
            cases.setdefault(sample.case_id, sample)
            answers.setdefault(sample.case_id, []).append((stage, sample))
    return [(case, answers[case_id]) for case_id, case in cases.items()]


def _metrics(story: Story) -> list[tuple[str, list[tuple[str, Estimate | None]]]]:
    """By title, each metric of the domain with what it is after every stage that was measured."""
    shown = {
        name: title for name, title in story.task.metrics.items() if any(name in m.measured for _, m in story.measured)
    }
    return [
        (title, [(stage, measured.measured.get(name)) for stage, measured in story.measured])
        for name, title in shown.items()
    ]


def _serving(story: Story) -> dict[str, str]:
    body = story.task.example
    if story.task.route.endswith("completions"):
        body = {"model": story.model, **body}
    about = (
        "This lifecycle promoted it; `twinloop status` says what is served now."
        if story.promoted
        else f"It is not the champion: `twinloop promote {story.version}` makes a version that passed the gate one."
    )
    quoted = json.dumps(body).replace("'", "'\\''")
    return {"about": about, "commands": SERVED.format(model=story.model, route=story.task.route, body=quoted)}


def _words(text: str) -> Markup:
    """Text with `code` in it, as HTML."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _short(number: float) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:g}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.1f} s"


def _measured(value: float | None, field: str) -> str:
    return "–" if value is None else show_field(field, value)


def _bits(stage: Stage) -> str:
    found = stage.measured.metrics if stage.measured else {}
    names = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high")
    value, *ends = [f"{found[name]:.3f}" for name in names if name in found] or [""]
    return f"{value} ({'–'.join(ends)})" if ends else value


def _interval(rate: Rate) -> str:
    if not rate.total:
        return ""
    low, high = rate.interval
    return f"{100 * rate.rate:.1f}% ({100 * low:.1f}–{100 * high:.1f})"


def _percent(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f}".removesuffix(".0") + "%" if rate.total else ""
