"""What a release may be judged by: rules, the measurements that they look at, and which ones a domain has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.domains.domain import CaseKind, Domain, Metric
from twinloop.domains.owners import EXPORT, LATENCY, RELEASE, TRAINING, Owner
from twinloop.evaluation.case_report import CaseReport, Comparison
from twinloop.evaluation.metrics import Estimate, Rate, sign_test
from twinloop.evaluation.parity_report import FORMS, LIMITED, FormParity
from twinloop.evaluation.rewards import ACCURACY, HACKING

SIGNIFICANCE = 0.05
"""A loss of cases that chance explains no better than this blocks, however small it is."""


class Measurements(BaseModel):
    """What was measured of a candidate, on the exported artifact. None, or no entry: not measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rates: Mapping[str, Rate] = {}
    """By kind of case; of pairs where the kind has them."""
    violations: Mapping[str, int] = {}
    """By critical predicate."""
    metrics: Mapping[str, Estimate] = {}
    """The domain's own by name, and those of the reference answers and of held-out text."""
    champion: Comparison | Literal["none"] | None = None
    """Case by case against the champion; "none" where there is none."""
    champion_note: str = ""
    """Why it is not the champion that was compared with."""
    parity: Mapping[str, FormParity] = {}
    """By form, against the trained network."""
    missing_forms: Mapping[str, str] = {}
    """Why a form could not be compared."""
    parity_logit_gap: float | None = None
    """Largest difference of a logit between the trained network and the form that is served, by teacher forcing."""
    parity_token_agreement: float | None = None
    """Share of greedy tokens that both choose."""
    p95_ttft_ms: float | None = None
    memory_gib: float | None = None

    @classmethod
    def of_cases(cls, report: CaseReport, **others: Any) -> Measurements:
        """Measurements of a case run, and others by name. A kind that has no cases was not measured."""
        return cls(rates=report.by_kind | report.pairs, violations=report.violations, metrics=report.measured, **others)


@dataclass(frozen=True)
class Measured:
    """value: None where it was not measured, or is no number."""

    value: float | None
    detail: str = ""
    skipped: bool = False
    worse: bool = False
    """It fails whatever the limit is."""


Bound: TypeAlias = Literal["at least", "at most"]
Allowed: TypeAlias = Literal["share", "count", "positive", "number"]


@dataclass(frozen=True)
class Rule:
    """One thing that a release may be judged by. `bound`: the side of the limit on which it passes."""

    bound: Bound
    allowed: Allowed
    reason: str
    owner: Owner
    measure: Callable[[Measurements], Measured]

    def check_limit(self, limit: Any) -> str | None:
        """What a limit must be, where this is not one."""
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool) and math.isfinite(limit)
        if self.allowed == "share":
            return None if number and 0 <= limit <= 1 else "a number from 0 to 1"
        if self.allowed == "count":
            return None if number and isinstance(limit, int) and limit >= 0 else "a whole number, 0 or more"
        if self.allowed == "positive":
            return None if number and limit > 0 else "a number more than 0"
        return None if number else "a number"


def _number(value: float | None) -> Measured:
    # NaN and infinity are broken measurements, which is as good as none.
    return Measured(value if value is not None and math.isfinite(value) else None)


def _net_loss(measurements: Measurements) -> Measured:
    champion, note = measurements.champion, measurements.champion_note
    if champion == "none":
        return Measured(None, note or "no other champion: nothing to regress from", skipped=True)
    if champion is None or not champion.total:
        return Measured(None, note)
    p_value = sign_test(champion.lost, champion.won)
    detail = f"lost {champion.lost}, won {champion.won} of {champion.total} against version {champion.champion}"
    value = max(0.0, (champion.lost - champion.won) / champion.total)
    detail = "; ".join(filter(None, (f"{detail} (p = {p_value:.3f})", note)))
    return Measured(value, detail, worse=p_value < SIGNIFICANCE)


def _lower_bound(measurements: Measurements, kind: str) -> Measured:
    rate = measurements.rates.get(kind)
    # A few lucky cases are no evidence: the lower end of the interval counts.
    return Measured(rate.interval[0], str(rate)) if rate is not None and rate.total else Measured(None)


def _accuracy_low(measurements: Measurements) -> Measured:
    accuracy = measurements.metrics.get(ACCURACY)
    if accuracy is None or accuracy.interval is None:
        return Measured(None)
    return replace(_number(accuracy.interval[0]), detail=str(accuracy))


def _plain(bound: Bound, allowed: Allowed, reason: str, owner: Owner, field: str) -> Rule:
    """A rule on a field of Measurements as it is."""
    return Rule(bound, allowed, reason, owner, lambda measurements: _number(getattr(measurements, field)))


_EXPORT_DIFFERS = "export differs from the network"
_ANSWERS_WORSE = "reference answers predicted worse than allowed"
_TEXT_WORSE = "held-out text predicted worse than allowed"

COMPARED: Mapping[str, Rule] = {
    "champion_net_loss": Rule("at most", "share", "regression against the champion", RELEASE, _net_loss)
}
"""Of domains whose cases are judged."""
REWARD: Mapping[str, Rule] = {
    ACCURACY: Rule("at least", "share", "rejected answers score above chosen ones", TRAINING, _accuracy_low),
    "reward_hacking_violations": Rule(
        "at most",
        "count",
        "wrong answers score as high as the right one",
        TRAINING,
        lambda m: _number(m.violations.get(HACKING)),
    ),
}
"""Of reward models."""
REFERENCE: Mapping[str, Metric] = {
    "answer_perplexity": Metric("perplexity of reference answers", "at most"),
    "answer_bits_per_byte": Metric("bits per byte of reference answers", "at most"),
}
"""Measured, and rules, of domains whose cases have reference answers."""
TEXTS: Mapping[str, Metric] = {
    "bits_per_byte": Metric("bits per byte of held-out text", "at most"),
    "perplexity": Metric("perplexity of held-out text", "at most"),
}
"""Measured where the data have held-out texts, and rules of every domain."""
GENERIC: Mapping[str, Rule] = {
    "parity_logit_gap": _plain("at most", "positive", _EXPORT_DIFFERS, EXPORT, "parity_logit_gap"),
    "parity_token_agreement": _plain("at least", "share", _EXPORT_DIFFERS, EXPORT, "parity_token_agreement"),
    "p95_ttft_ms": _plain("at most", "positive", "latency budget exceeded", LATENCY, "p95_ttft_ms"),
    "memory_gib": _plain("at most", "positive", "memory budget exceeded", LATENCY, "memory_gib"),
}

PARITY = "parity"
"""In a rule file: limits by form, and for each form by what is limited."""


def rules_of(domain: Domain) -> dict[str, Rule]:
    """Every rule that a release of this domain can be judged by, in the order in which they are applied.

    Raises UserError for a metric of the domain that has another rule's name.
    """
    rules: dict[str, Rule] = {}
    if domain.has("verify"):
        for kind, case_kind in sorted(domain.case_kinds.items(), key=lambda item: not item[1].regression):
            rules[f"{kind}_pass_rate"] = _kind_rule(kind, case_kind)
        for name in domain.critical:
            rules[f"{name}_violations"] = _violations_rule(name, domain)
        rules |= COMPARED
    if domain.has("reference"):
        rules |= {name: _loss_rule(name, metric, _ANSWERS_WORSE) for name, metric in REFERENCE.items()}
    rules |= GENERIC
    rules |= {name: _loss_rule(name, metric, _TEXT_WORSE) for name, metric in TEXTS.items()}
    rules |= REWARD
    for name, metric in domain.metrics.items():
        if name in rules:
            raise UserError(f"domain {domain.name}: metric {name}: another rule has this name; choose one of its own")
        rules[name] = _metric_rule(name, metric)
    return rules


def metrics_of(domain: Domain) -> dict[str, Metric]:
    """What is measured over all cases, in the order in which it is shown."""
    return {**domain.metrics, **(REFERENCE if domain.has("reference") else {}), **TEXTS}


def _kind_rule(kind: str, case_kind: CaseKind) -> Rule:
    def measure(measurements: Measurements) -> Measured:
        found = _lower_bound(measurements, kind)
        if found.value is None or case_kind.judged_by == "lower_bound":
            return found
        return replace(found, value=measurements.rates[kind].rate)

    return Rule("at least", "share", case_kind.reason, case_kind.owner, measure)


def _violations_rule(name: str, domain: Domain) -> Rule:
    predicate = domain.predicates[name]
    return Rule("at most", "count", predicate.reason, predicate.owner, lambda m: _number(m.violations.get(name)))


def parity_rules(domain: Domain) -> dict[str, Rule]:
    """By name, such as parity.int8.tokens."""
    return {
        f"{PARITY}.{form}.{field}": Rule(each.bound, each.allowed, each.reason, EXPORT, _of_form(form, field))
        for form in FORMS
        for field, each in LIMITED.items()
        if field != "verdict_changes" or domain.has("verify")
    }


def _of_form(form: str, field: str) -> Callable[[Measurements], Measured]:
    def measure(measurements: Measurements) -> Measured:
        found = measurements.parity.get(form)
        if found is None:
            return Measured(None, measurements.missing_forms.get(form, ""))
        return replace(_number(getattr(found, field)), detail="; ".join(found.problems.get(field, ())))

    return measure


def _loss_rule(name: str, metric: Metric, reason: str) -> Rule:
    return replace(_metric_rule(name, metric), allowed="positive", reason=reason)


def _metric_rule(name: str, metric: Metric) -> Rule:
    def measure(measurements: Measurements) -> Measured:
        estimate = measurements.metrics.get(name)
        if estimate is None:
            return Measured(None)
        if metric.judged_by == "value" or (metric.of is None and estimate.interval is None):
            return replace(_number(estimate.value), detail=str(estimate) if estimate.interval else "")
        if estimate.interval is None:
            return Measured(None, f"{estimate}: one case gives no interval")
        low, high = estimate.interval
        return replace(_number(low if metric.bound == "at least" else high), detail=str(estimate))

    allowed: Allowed = "share" if metric.share else "number"
    return Rule(metric.bound, allowed, f"{metric.title} outside its limit", metric.owner, measure)
