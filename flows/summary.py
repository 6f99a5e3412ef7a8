"""The last page of a run: a row a stage, the gate's report, what was promoted, what it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from twinloop.flows.outcome import Outcome, Stage

# A predicate's name in one short word, in the verifier's order.
HEADS = {
    "parsed": "json",
    "eligible": "verdict",
    "policy_id": "policy",
    "evidence": "quote",
    "window_days": "window",
    "days": "days",
    "no_unperformed_action": "honest",
}
WORTH_TELLING = 0.005


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Print it all."""
    console.print()
    console.print(stage_table(outcome.stages))
    if outcome.gate is not None:
        console.print(outcome.gate.text(), highlight=False, markup=False, soft_wrap=True)
    version = outcome.version
    if outcome.promotion and version:
        console.print(f"\npromoted: {version}, digest {version.digest}", highlight=False, soft_wrap=True)
    elif version:
        why = outcome.refusal or f"{version} stays candidate, and what is served has not changed"
        console.print(f"\nnot promoted: {why}", highlight=False, markup=False, soft_wrap=True)
    if outcome.silence:
        console.print(f"no answer over HTTP: {outcome.silence}", highlight=False, markup=False, soft_wrap=True)
    if outcome.answer:
        request, body = outcome.answer.request, outcome.answer.body
        console.print(f"{json.dumps(request)} over HTTP:", highlight=False, markup=False, soft_wrap=True)
        if "decision" in body:
            shown = {"decision": body["decision"], "escalated": body["escalated"], "model": body["model"]["version"]}
        else:
            shown = {"answer": body["choices"][0]["message"]["content"], "model": body["model"]}
        console.print(json.dumps(shown), highlight=False, markup=False, soft_wrap=True)


def stage_table(stages: list[Stage]) -> Table:
    """One row a stage; a time in brackets is an earlier run's. Rates are of held-out cases, with Wilson's interval."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for head in ("time", "tokens/s", "bits/byte", "pass rate (95% CI)", *HEADS.values()):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("improved", overflow="fold")
    before: Mapping[str, Any] = {}
    for stage in stages:
        measured = stage.measured.metrics if stage.measured else {}
        made = stage.artifact.metrics if stage.artifact else {}
        table.add_row(
            stage.name,
            _time(stage),
            f"{made['tokens_per_s']:,.0f}" if "tokens_per_s" in made else "",
            f"{measured['bits_per_byte']:.3f}" if "bits_per_byte" in measured else "",
            _pass_rate(measured),
            *(_percent(measured.get("predicates", {}).get(name)) for name in HEADS),
            stage.note or (improvement(before, measured) if measured else _made(made)),
        )
        before = measured or before
    return table


def _time(stage: Stage) -> str:
    """In brackets where another run took it, and this one only verified the bytes."""
    if stage.seconds is None:
        return "verified" if stage.reused else ""
    return f"({stage.seconds:.1f} s)" if stage.reused else f"{stage.seconds:.1f} s"


def improvement(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What got better most, in words: at most two predicates, and bits per byte where they fell."""
    if not before:
        return f"from nothing to {after['bits_per_byte']:.2f} bits/byte"
    gains = {
        HEADS[name]: (before["predicates"][name], rate)
        for name, rate in after["predicates"].items()
        if rate - before["predicates"][name] > WORTH_TELLING
    }
    best = sorted(gains.items(), key=lambda gain: gain[1][0] - gain[1][1])[:2]
    told = [f"{name} {_percent(old)} → {_percent(new)}" for name, (old, new) in best]
    if after["bits_per_byte"] < before["bits_per_byte"] - WORTH_TELLING:
        told.append(f"bits/byte {before['bits_per_byte']:.2f} → {after['bits_per_byte']:.2f}")
    return ", ".join(told)


def _made(metrics: Mapping[str, Any]) -> str:
    """A line for stages that train nothing."""
    if "rows" in metrics:
        return f"{metrics['rows']:,.0f} rows checked, {metrics['quarantined']:,.0f} set aside"
    if "bytes_per_token" in metrics:
        return f"{metrics['vocab_size']} tokens, {metrics['bytes_per_token']:.2f} bytes each"
    if "refused" in metrics:
        return f"verifier refused all {metrics['refused']:,} wrong answers"
    if "logit_gap" in metrics:
        agreement = _percent(metrics["token_agreement"])
        return f"{metrics['bytes'] / 2**20:.1f} MiB, logits within {metrics['logit_gap']:.1e}, tokens {agreement}"
    return ""


def _pass_rate(measured: Mapping[str, Any]) -> str:
    if "pass_rate" not in measured:
        return ""
    low, high = measured["pass_rate_interval"]
    return f"{100 * measured['pass_rate']:.1f}% ({100 * low:.1f}-{100 * high:.1f})"


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}".removesuffix(".0") + "%"
