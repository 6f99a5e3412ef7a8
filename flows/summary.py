"""The end of a run's output: stages, quality by stage, the gate's report, what was promoted, what it answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from twinloop.domains.domain import Domain
from twinloop.evaluation.parity_report import REFERENCE
from twinloop.evaluation.rules import TEXTS, metrics_of
from twinloop.flows.outcome import Outcome
from twinloop.report.rows import StageRow

SHOWN_CHANGE = 0.005
"""Of a rate or of bits per byte; less is noise."""


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Print it all."""
    console.print()
    console.print(stage_table(outcome.rows, outcome.domain))
    console.print()
    console.print(quality_table(outcome.rows, outcome.domain))
    for line in legend(outcome.rows, outcome.domain):
        console.print(f"  {line}", style="dim", highlight=False, markup=False, soft_wrap=True)
    if (metrics := metrics_table(outcome.rows, outcome.domain)).row_count:
        console.print()
        console.print(metrics)
    console.print()
    console.print(outcome.gate.text(), highlight=False, markup=False, soft_wrap=True)
    version, error = outcome.published.version, outcome.published.error
    if outcome.published.promotion:
        what = "promoted" if outcome.published.moved else "champion already"
        console.print(f"\n{what}: {version}, digest {version.digest}", highlight=False, soft_wrap=True)
    else:
        why = error or f"{version} stays candidate, and what is served has not changed"
        console.print(f"\nnot promoted: {why}", highlight=False, markup=False, soft_wrap=True)
    if outcome.serve_error:
        console.print(f"no answer over HTTP: {outcome.serve_error}", highlight=False, markup=False, soft_wrap=True)
    if outcome.answer:
        request, body = outcome.answer.request, outcome.answer.body
        console.print(f"{json.dumps(request)} over HTTP:", highlight=False, markup=False, soft_wrap=True)
        if "data" in body:
            shown = {"data": body["data"], "model": body["model"]}
        elif "decision" in body:
            shown = {"decision": body["decision"], "escalated": body["escalated"], "model": body["model"]["version"]}
        else:
            shown = {"answer": body["choices"][0]["message"]["content"], "model": body["model"]}
        console.print(json.dumps(shown), highlight=False, markup=False, soft_wrap=True)
    if outcome.report:
        console.print(f"report: {os.path.relpath(outcome.report)}", highlight=False, markup=False, soft_wrap=True)


def stage_table(rows: Sequence[StageRow], domain: Domain) -> Table:
    """One row a stage: how long it took, and what came of it. A time in brackets is an earlier run's."""
    titles = {name: predicate.title for name, predicate in domain.predicates.items()}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for head in ("time", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    models: dict[str | None, Mapping[str, Any]] = {}
    for row in rows:
        measured = row.measured.metrics if row.measured else {}
        made = row.artifact.metrics if row.artifact else {}
        source = row.artifact.manifest.inputs.get("model") if row.artifact else None
        before = models.get(source.key, {}) if source else {}
        speed = f"{made['tokens_per_s']:,.0f}" if "tokens_per_s" in made else ""
        table.add_row(row.name, _time(row), speed, row.note or _result(before, measured, made, titles))
        if row.artifact and measured:
            models[row.artifact.key] = measured
    return table


def _result(
    before: Mapping[str, Any], measured: Mapping[str, Any], made: Mapping[str, Any], titles: Mapping[str, str]
) -> str:
    if "reward_margin" in measured:
        hacked = measured.get("reward_hacking_share")
        tried = "" if hacked is None else f", {_percent(hacked)} of wrong answers score as high as the right one"
        return f"right in {_percent(measured['pass_rate'])} of held-out pairs{tried}"
    return change(before, measured, titles) if before and measured else _made(made)


def quality_table(rows: Sequence[StageRow], domain: Domain) -> Table:
    """One row for each model that was measured: rates of the cases, with a column for each predicate of the domain."""
    titles = {name: predicate.title for name, predicate in domain.predicates.items()}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("after", no_wrap=True)
    for head in ("bits/byte (95% CI)", "cases passed (95% CI)", *titles.values()):
        table.add_column(head, justify="right", no_wrap=head not in titles.values())
    for row in rows:
        if row.measured:
            measured = row.measured.metrics
            table.add_row(
                row.name,
                _estimate(measured, "bits_per_byte", ".3f"),
                _pass_rate(measured),
                *(_percent(measured.get("predicates", {}).get(name)) for name in titles),
            )
    return table


def metrics_table(rows: Sequence[StageRow], domain: Domain) -> Table:
    """One row for each metric of the domain that was measured, with a column for each model. What is measured on
    held-out text is in `quality_table`."""
    measured = {row.name: row.measured.metrics for row in rows if row.measured}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric (95% CI)", overflow="fold")
    for name in measured:
        table.add_column(name, justify="right", no_wrap=True)
    for name, metric in metrics_of(domain).items():
        if name not in TEXTS and any(name in each for each in measured.values()):
            table.add_row(metric.title, *(_estimate(each, name) for each in measured.values()))
    return table


def legend(rows: Sequence[StageRow], domain: Domain) -> list[str]:
    """What the columns of `quality_table` mean, a line each."""
    named = {"cases passed": "every check on the right of it holds; the interval is Wilson's"}
    if any(row.measured and "bits_per_byte" in row.measured.metrics for row in rows):
        named = {"bits/byte": "loss on held-out text, in bits a byte; its interval is a bootstrap's over texts"} | named
    named |= {predicate.title: predicate.meaning for predicate in domain.predicates.values() if predicate.meaning}
    width = max(map(len, named))
    return [f"{name:<{width}}  {meaning}" for name, meaning in named.items()]


def _time(row: StageRow) -> str:
    """In brackets where another run took it, and this one only verified the bytes."""
    if row.seconds is None:
        return "verified" if row.reused else ""
    return f"({row.seconds:.1f} s)" if row.reused else f"{row.seconds:.1f} s"


def change(before: Mapping[str, Any], after: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """What changed most, for better or worse, in words: at most two predicates, and bits per byte where they fell.

    They rise with every stage that trains on other text than documents, so a rise says nothing.
    """
    earlier = before.get("predicates", {})
    rates = {name: (earlier.get(name, 0.0), rate) for name, rate in after.get("predicates", {}).items()}
    changes = {titles.get(name, name): pair for name, pair in rates.items() if abs(pair[1] - pair[0]) > SHOWN_CHANGE}
    most = sorted(changes.items(), key=lambda each: -abs(each[1][1] - each[1][0]))[:2]
    words = [f"{title} {_percent(old)} → {_percent(new)}" for title, (old, new) in most]
    bits = [metrics.get("bits_per_byte") for metrics in (before, after)]
    if bits[0] is not None and bits[1] is not None and bits[1] < bits[0] - SHOWN_CHANGE:
        words.append(f"bits/byte {bits[0]:.2f} → {bits[1]:.2f}")
    return ", ".join(words) or "no change"


def _made(metrics: Mapping[str, Any]) -> str:
    """A line for the first stage of training, and for those that train nothing."""
    if "initial_loss" in metrics:
        return f"initial loss {metrics['initial_loss']:.2f}, last {metrics['loss']:.2f}"
    if "rows" in metrics:
        return f"{metrics['rows']:,.0f} rows checked, {metrics['quarantined']:,.0f} quarantined"
    if "vocab_size" in metrics:
        bytes_each = f", {metrics['bytes_per_token']:.2f} bytes each" if "bytes_per_token" in metrics else ""
        return f"{metrics['vocab_size']} tokens{bytes_each}"
    if "longest" in metrics:
        return f"longest record {max(_token_counts(metrics['longest']))} tokens"
    if "refused" in metrics:
        return f"verifier refused all {metrics['refused']:,} wrong answers"
    if "compared_forms" in metrics:
        return compared(metrics)
    if "bytes" in metrics:
        return f"{metrics['bytes'] / 2**20:.1f} MiB"
    if "parameters" in metrics:
        return f"{metrics['parameters']:,} parameters"
    return ""


def compared(metrics: Mapping[str, Any]) -> str:
    """Tokens alike of each form that was compared with the network, and the largest logit gap where it is a number.

    llama.cpp tells no logits.
    """
    forms = [form for name in metrics if (form := name.removesuffix("/tokens")) not in (name, REFERENCE)]
    gaps = {form: metrics.get(f"{form}/logit_gap") for form in forms}
    words = [
        f"{form} {_percent(metrics[f'{form}/tokens'])}" + ("" if gaps[form] is None else f" within {gaps[form]:.1e}")
        for form in forms
    ]
    return f"tokens alike: {', '.join(words)}" if words else "no form was compared"


def _token_counts(longest: Mapping[str, Mapping[str, Any]]) -> list[int]:
    return [found["tokens"] for kinds in longest.values() for found in kinds.values()]


def _pass_rate(measured: Mapping[str, Any]) -> str:
    if "pass_rate" not in measured:
        return ""
    low, high = measured["pass_rate_interval"]
    return f"{100 * measured['pass_rate']:.1f}% ({100 * low:.1f}-{100 * high:.1f})"


def _estimate(measured: Mapping[str, Any], name: str, digits: str = ".4g") -> str:
    if name not in measured:
        return ""
    value, *ends = (f"{measured[each]:{digits}}" for each in (name, f"{name}_low", f"{name}_high") if each in measured)
    return f"{value} ({'-'.join(ends)})" if ends else value


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}".removesuffix(".0") + "%"
