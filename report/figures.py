"""Which figures a story has, by name: what is measured, against what, in which units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twinloop.domains.metrics import CALIBRATION_BINS
from twinloop.evaluation.metrics import Rate, percentile
from twinloop.report.drawing import COLOURS, HEIGHT, MARKERS, Panel
from twinloop.report.lineage import lineage_panel
from twinloop.report.story import Curve, Load, Stage, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

MOST_OPAQUE = 0.6
"""A cell's colour, so that dark text and light text are read on it."""


@dataclass(frozen=True)
class _Chart:
    """Metrics of training that belong on one pair of axes, with what each is called there."""

    title: str
    unit: str
    metrics: Mapping[str, str]


CHARTS = (
    _Chart("Loss", "mean loss of a step", {"loss": "loss"}),
    _Chart("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
    _Chart("Gradient norm", "norm before clipping", {"grad_norm": "gradient norm"}),
    _Chart("Preference margin", "margin (nats)", {"margin": "chosen − rejected"}),
    _Chart("Preference accuracy", "share of pairs", {"accuracy": "chosen is preferred"}),
    _Chart(
        "Shift from the reference",
        "log-probability (nats)",
        {"chosen_shift": "chosen", "rejected_shift": "rejected"},
    ),
    _Chart(
        "Reward",
        "mean reward of a rollout",
        {"reward": "reward", "verifier": "of the verifier", "model_reward": "of the reward model"},
    ),
    _Chart("KL divergence", "nats per token", {"reference_kl": "to the reference", "approx_kl": "of the last update"}),
    _Chart("KL divergence of an answer", "nats per answer", {"kl": "to the reference"}),
    _Chart("Price of the KL divergence", "reward per nat", {"kl_coef": "coefficient"}),
    _Chart("Losses of PPO", "mean loss of a step", {"policy_loss": "policy", "value_loss": "critic"}),
    _Chart("What the critic expects", "reward", {"value": "mean value"}),
    _Chart("Variance of the returns", "share", {"explained_variance": "known to the critic"}),
    _Chart("Entropy of the policy", "nats per token", {"entropy": "entropy"}),
    _Chart("Length of rollouts", "tokens", {"length": "length"}),
    _Chart("Groups with a signal", "groups", {"groups": "all", "informative_groups": "rewards differ"}),
    _Chart(
        "Rollouts that went wrong",
        "share",
        {
            "length_limited": "cut off",
            "unparseable": "not parsed",
            "clip_fraction": "ratio clipped",
            "value_clip_fraction": "value clipped",
        },
    ),
)
UNDRAWN = {"rollout_tokens_per_s", "ratio", "logprob_gap", "logprob_gap_max"}
"""In MLflow's own charts: of the machine and of rounding, not of the model."""


def figures(story: Story) -> dict[str, list[Panel]]:
    """Panels by the figure's name. A figure for which nothing was measured is left out."""
    found = {f"training_{stage.name}": training_panels(stage) for stage in story.stages}
    found["pass_rates"] = _rate_panels(story)
    found["confusion"] = [Panel("Right outcome and answered one", _confusion, (story.outcomes,), 3.4)]
    found["reliability"] = [Panel("Confidence and how often it is right", _reliability, (story.confidences,), 3.4)]
    found["serving"] = _serving_panels(story)
    found["lineage"] = [lineage_panel(story)]
    empty = {"confusion": not story.outcomes, "reliability": not story.confidences}
    return {name: panels for name, panels in found.items() if panels and not empty.get(name)}


def axis_of(metric: str) -> tuple[str, str]:
    """The title and the unit of a metric of training."""
    return next(((chart.title, chart.unit) for chart in CHARTS if metric in chart.metrics), (metric, metric))


def training_panels(stage: Stage) -> list[Panel]:
    """Every metric of a stage of training over its steps."""
    known = {name for chart in CHARTS for name in chart.metrics}
    own = [_Chart(name, name, {name: name}) for name in stage.curves if name not in known | UNDRAWN]
    return [
        Panel(f"{chart.title} ({stage.name})", _curves, (shown, chart.unit))
        for chart in (*CHARTS, *own)
        if (shown := {label: stage.curves[name] for name, label in chart.metrics.items() if name in stage.curves})
    ]


def _curves(axes: Axes, shown: Mapping[str, Curve], unit: str) -> None:
    for (label, curve), colour in zip(shown.items(), COLOURS, strict=False):
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, color=colour, label=label, marker="o" if len(steps) < 12 else None, markersize=3)
    axes.set(xlabel="optimizer step", ylabel=unit)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.locator_params(axis="x", integer=True)
    if len(shown) > 1:
        axes.legend()


def _rate_panels(story: Story) -> list[Panel]:
    measured = [(name, each) for name, each in story.measured if each.overall.total]
    if not measured:
        return []
    _, last = measured[-1]
    limits = {check.rule.removesuffix("_pass_rate"): check.limit for check in story.gate.checks}
    kinds = [
        (f"{story.task.kinds.get(name, name)}\n({rate.total})", rate, limits.get(name))
        for name, rate in last.by_kind.items()
        if rate.total
    ]
    titles = {name: title for name, title in story.task.predicates.items() if name in last.by_predicate}
    tall, kinds_tall = (max(HEIGHT, 0.9 + 0.5 * len(rows)) for rows in (titles, last.by_kind))
    overall = {name: each.overall for name, each in measured}
    by_stage = {name: each.by_predicate for name, each in measured}
    return [
        Panel("Pass rate by stage, 95% interval", _by_stage, (overall,)),
        Panel("Pass rate by kind of case, 95% interval", _by_kind, (kinds,), kinds_tall),
        Panel("Predicates by stage, 95% interval", _by_predicate, (by_stage, titles), tall),
    ]


def _by_stage(axes: Axes, rates: Mapping[str, Rate]) -> None:
    for place, rate in enumerate(rates.values()):
        _interval(axes, place, rate, colour=COLOURS[0], upright=True)
        _label(axes, f"{rate.rate:.0%}", (place, rate.rate), (6, 0))
    axes.set_xticks(range(len(rates)), list(rates), rotation=20)
    axes.set(ylabel="share of cases that pass", ylim=(-0.03, 1.03), xlim=(-0.4, len(rates) - 0.4))
    axes.yaxis.set_major_formatter(_percents())


def _by_kind(axes: Axes, kinds: Sequence[tuple[str, Rate, float | None]]) -> None:
    """kinds: (title, rate, the gate's limit)."""
    for place, (_, rate, limit) in enumerate(kinds):
        _interval(axes, place, rate, colour=COLOURS[0])
        if limit is not None:
            axes.plot([limit], [place], marker="|", markersize=18, markeredgewidth=2, color=COLOURS[1])
    _rates_across(axes, [title for title, *_ in kinds])
    if any(limit is not None for *_, limit in kinds):
        axes.set_xlabel("share of cases; the bar is the limit of the gate")


def _by_predicate(axes: Axes, by_stage: Mapping[str, Mapping[str, Rate]], titles: Mapping[str, str]) -> None:
    spread = 0.7 / max(1, len(by_stage))
    for number, (stage, rates) in enumerate(by_stage.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for place, name in enumerate(titles):
            if name in rates:
                offset = (number - (len(by_stage) - 1) / 2) * spread
                _interval(axes, place + offset, rates[name], colour=colour, marker=marker)
        axes.plot([], [], marker, color=colour, markersize=4, label=stage)
    _rates_across(axes, list(titles.values()))
    below = 0.45 / (0.5 + 0.45 * len(titles))  # the height that the label of the axis takes, as a share of their height
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -below), ncols=min(3, len(by_stage)))


def _interval(axes: Axes, place: float, rate: Rate, *, colour: str, marker: str = "o", upright: bool = False) -> None:
    """A rate with its interval, at `place` of the other axis."""
    if not rate.total:
        return
    low, high = rate.interval
    error = [[rate.rate - low], [high - rate.rate]]
    x, y = ([place], [rate.rate]) if upright else ([rate.rate], [place])
    errors: dict[str, Any] = {"yerr" if upright else "xerr": error}
    axes.errorbar(x, y, fmt=marker, color=colour, markersize=4, capsize=2, elinewidth=1, **errors)


def _label(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float]) -> None:
    """Text beside a place; offset: in points."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=8)


def _rates_across(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="share of cases", xlim=(-0.03, 1.03), ylim=(len(names) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(_percents())


def _percents() -> Formatter:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def _confusion(axes: Axes, outcomes: Mapping[str, Mapping[str, int]]) -> None:
    from matplotlib.colors import ListedColormap

    rights, answers = list(outcomes), list(next(iter(outcomes.values())))
    shares = [[row[answer] / max(1, sum(row.values())) for answer in answers] for row in outcomes.values()]
    # The share is how opaque a cell is, so that the page's ground and text colour fit it, whichever they are.
    opaque = [[MOST_OPAQUE * share for share in row] for row in shares]
    axes.imshow([[0] * len(answers)] * len(rights), cmap=ListedColormap([COLOURS[0]]), alpha=opaque, aspect="auto")
    for y, row in enumerate(outcomes.values()):
        for x, answer in enumerate(answers):
            axes.text(x, y, f"{row[answer]:,}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(answers)), answers, rotation=30 if len(answers) > 3 else 0)
    axes.set_yticks(range(len(rights)), rights)
    axes.set(xlabel="answered", ylabel="right")
    axes.grid(visible=False)


def _reliability(axes: Axes, confidences: Sequence[tuple[float, bool]]) -> None:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, passed in confidences:
        bins.setdefault(min(CALIBRATION_BINS - 1, int(confidence * CALIBRATION_BINS)), []).append((confidence, passed))
    axes.plot([0, 1], [0, 1], "--", color=COLOURS[-1], linewidth=1, label="calibrated")
    gap = 0.0
    for cases in bins.values():
        sure = sum(confidence for confidence, _ in cases) / len(cases)
        rate = Rate.of([passed for _, passed in cases])
        gap += len(cases) / len(confidences) * abs(rate.rate - sure)
        _interval(axes, sure, rate, colour=COLOURS[0], upright=True)
        _label(axes, f"{len(cases)}", (sure, rate.rate), (5, 4))
    axes.plot([], [], "o", color=COLOURS[0], markersize=4, label="cases, with their number")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), ylabel="share of cases that pass")
    axes.set_xlabel(f"probability of the whole answer\nexpected calibration error {gap:.3f}")
    axes.legend(loc="upper left")


def _serving_panels(story: Story) -> list[Panel]:
    if story.load is None:
        return []
    limits = {check.rule: check.limit for check in story.gate.checks}
    return [
        Panel("Latency under load", _latency, (story.load, limits.get("p95_ttft_ms")), 3.4),
        Panel("Memory of the server", _memory, (story.load, limits.get("memory_gib")), 2.0),
    ]


def _latency(axes: Axes, load: Load, limit: float | None) -> None:
    for times, label, colour in (
        (load.ttft_ms, "first token", COLOURS[0]),
        (load.answer_ms, "whole answer", COLOURS[1]),
    ):
        shares = [(number + 1) / len(times) for number in range(len(times))]
        axes.step(times, shares, where="post", color=colour, label=f"{label}, p95 {percentile(times, 0.95):.3g} ms")
        axes.plot([percentile(times, 0.5), percentile(times, 0.95)], [0.5, 0.95], "o", color=colour, markersize=4)
    highest = load.answer_ms[-1]
    if limit is not None and limit < 20 * highest:
        axes.axvline(limit, color=COLOURS[2], linestyle="--", linewidth=1, label=f"limit of p95 {limit:g} ms")
    lowest = max(1e-3, load.ttft_ms[0])
    if highest / lowest > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="milliseconds", ylabel="share of requests within it", ylim=(0, 1.03))
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.17))


def _memory(axes: Axes, load: Load, limit: float | None) -> None:
    axes.barh([0], [load.memory_gib], height=0.5, color=COLOURS[0])
    _label(axes, f"{load.memory_gib:.2f} GiB", (load.memory_gib, 0), (5, -3))
    if limit is not None:
        axes.axvline(limit, color=COLOURS[1], linestyle="--", linewidth=1)
        axes.text(limit, 0.42, f"limit {limit:g} ", ha="right", fontsize=8)
    widest = max(load.memory_gib * 1.3, (limit or 0) * 1.05)
    axes.set(xlim=(0, widest if math.isfinite(widest) else 1), ylim=(-0.5, 0.6), xlabel="GiB, the most it held")
    axes.set_yticks([])
