"""The release gate: rules from a YAML file, measurements of one candidate, a decision that names its reasons.

A rule file is a mapping of rule to limit. The domain defines which rules there are (`rules_of`); the limits are the
file's. A rule whose measurement is missing blocks: nothing passes by absence. Only a regression against a champion is
skipped, and reported as such, while there is none.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import read_yaml
from twinloop.domains.domain import CaseKind, Domain
from twinloop.domains.owners import EXPORT, LATENCY, RELEASE, TRAINING, Owner
from twinloop.evaluation.case_report import CaseReport, Comparison
from twinloop.evaluation.metrics import Rate, sign_test

SIGNIFICANCE = 0.05
"""A loss of cases that chance explains no better than this blocks, however small it is."""


class Measurements(BaseModel):
    """What was measured of a candidate, on the exported artifact. None, or no entry: not measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rates: Mapping[str, Rate] = {}
    """By kind of case; of pairs where the kind has them."""
    violations: Mapping[str, int] = {}
    """By critical predicate."""
    metrics: Mapping[str, float] = {}
    """The domain's own, by name."""
    champion: Comparison | Literal["none"] | None = None
    """Case by case against the champion; "none" where nothing was ever promoted."""
    parity_logit_gap: float | None = None
    """Largest difference of a logit between the trained network and the engine, by teacher forcing."""
    parity_token_agreement: float | None = None
    """Share of greedy tokens that both choose."""
    p95_ttft_ms: float | None = None
    memory_gib: float | None = None
    bits_per_byte: float | None = None
    """Of held-out text, as is its perplexity."""
    perplexity: float | None = None
    answer_perplexity: float | None = None
    """Of the reference answers to the cases."""

    @classmethod
    def of_cases(cls, report: CaseReport, **others: Any) -> Measurements:
        """Measurements of a case run, and others by name. A kind that has no cases was not measured."""
        return cls(rates=report.by_kind | report.pairs, violations=report.violations, metrics=report.measured, **others)


@dataclass(frozen=True)
class _Measured:
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
    measure: Callable[[Measurements], _Measured]

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


def _number(value: float | None) -> _Measured:
    # NaN and infinity are broken measurements, which is as good as none.
    return _Measured(value if value is not None and math.isfinite(value) else None)


def _net_loss(champion: Comparison | Literal["none"] | None) -> _Measured:
    if champion == "none":
        return _Measured(None, "no other champion: nothing to regress from", skipped=True)
    if champion is None or not champion.total:
        return _Measured(None)
    p_value = sign_test(champion.lost, champion.won)
    detail = f"lost {champion.lost}, won {champion.won} of {champion.total} against version {champion.champion}"
    value = max(0.0, (champion.lost - champion.won) / champion.total)
    return _Measured(value, f"{detail} (p = {p_value:.3f})", worse=p_value < SIGNIFICANCE)


def _plain(bound: Bound, allowed: Allowed, reason: str, owner: Owner, field: str) -> Rule:
    """A rule on a field of Measurements as it is."""
    return Rule(bound, allowed, reason, owner, lambda measurements: _number(getattr(measurements, field)))


_EXPORT_DIFFERS = "export differs from the network"
_TEXT_WORSE = "held-out text predicted worse than allowed"

COMPARED: Mapping[str, Rule] = {
    "champion_net_loss": Rule(
        "at most", "share", "regression against the champion", RELEASE, lambda m: _net_loss(m.champion)
    )
}
"""Of domains whose cases are judged."""
REFERENCE: Mapping[str, Rule] = {
    "answer_perplexity": _plain(
        "at most", "positive", "reference answers predicted worse than allowed", TRAINING, "answer_perplexity"
    )
}
"""Of domains whose cases have reference answers."""
GENERIC: Mapping[str, Rule] = {
    "parity_logit_gap": _plain("at most", "positive", _EXPORT_DIFFERS, EXPORT, "parity_logit_gap"),
    "parity_token_agreement": _plain("at least", "share", _EXPORT_DIFFERS, EXPORT, "parity_token_agreement"),
    "p95_ttft_ms": _plain("at most", "positive", "latency budget exceeded", LATENCY, "p95_ttft_ms"),
    "memory_gib": _plain("at most", "positive", "memory budget exceeded", LATENCY, "memory_gib"),
    "bits_per_byte": _plain("at most", "positive", _TEXT_WORSE, TRAINING, "bits_per_byte"),
    "perplexity": _plain("at most", "positive", _TEXT_WORSE, TRAINING, "perplexity"),
}


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
        rules |= REFERENCE
    rules |= GENERIC
    for name, metric in domain.metrics.items():
        if name in rules:
            raise UserError(f"domain {domain.name}: metric {name}: another rule has this name; choose one of its own")
        reason = f"{metric.title} outside its limit"
        rules[name] = Rule(
            metric.bound, "share" if metric.share else "number", reason, metric.owner, _domain_metric(name)
        )
    return rules


def _kind_rule(kind: str, case_kind: CaseKind) -> Rule:
    def measure(measurements: Measurements) -> _Measured:
        rate = measurements.rates.get(kind)
        if rate is None or not rate.total:
            return _Measured(None)
        # A few lucky cases are no evidence: by default the lower end of the interval counts.
        return _Measured(rate.rate if case_kind.judged_by == "share" else rate.interval[0], str(rate))

    return Rule("at least", "share", case_kind.reason, case_kind.owner, measure)


def _violations_rule(name: str, domain: Domain) -> Rule:
    predicate = domain.predicates[name]
    return Rule("at most", "count", predicate.reason, predicate.owner, lambda m: _number(m.violations.get(name)))


def _domain_metric(name: str) -> Callable[[Measurements], _Measured]:
    return lambda measurements: _number(measurements.metrics.get(name))


@dataclass(frozen=True)
class GateRules:
    """Limits by rule, checked. `source` is where they were read, for messages."""

    limits: Mapping[str, float]
    domain: Domain
    source: str = "gate rules"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown rule or a limit of the wrong type, naming file, key and allowed values."""
        known = f"known rules: {', '.join(self.rules)}"
        if not isinstance(self.limits, Mapping) or not self.limits:
            raise UserError(f"{self.source}: no rules; a gate without any would ship everything. {known}")
        for name, limit in self.limits.items():
            if name not in self.rules:
                near = difflib.get_close_matches(str(name), self.rules, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"{self.source}: {name}: no such rule of domain {self.domain.name}; {hint}{known}")
            if needed := self.rules[name].check_limit(limit):
                raise UserError(f"{self.source}: {name}: {limit!r} is not {needed}")

    @cached_property
    def rules(self) -> dict[str, Rule]:
        """All that the domain has, whether there is a limit for them or not."""
        return rules_of(self.domain)

    @property
    def digest(self) -> str:
        """Sha256 of the limits, in whatever order they were written."""
        return _sha256({name: float(limit) for name, limit in self.limits.items()})


class Reason(BaseModel):
    """Why a release is blocked. `measured` is None where nothing was measured; `limit` as in the rule file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str
    reason: str
    owner: str
    measured: float | None
    limit: float


class Check(BaseModel):
    """One rule applied."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str
    outcome: Literal["pass", "block", "skipped"]
    measured: float | None
    bound: Bound
    limit: float
    detail: str


class GateReport(BaseModel):
    """The decision about one candidate, with every rule that was applied. SHIP has no reasons."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decision: Literal["SHIP", "BLOCK"]
    reasons: tuple[Reason, ...]
    checks: tuple[Check, ...]
    candidate: str
    """Digest of what was judged: promotion refuses a report on anything else."""
    rules_digest: str

    def digest(self) -> str:
        """Sha256 of the whole report; the ledger keeps it."""
        return _sha256(self.model_dump(mode="json"))

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> GateReport:
        """Read a report. Raises pydantic's ValidationError (a ValueError) for anything else."""
        return cls.model_validate_json(text)

    def text(self) -> str:
        """For people: the decision, a line a rule, then where to look for each reason."""
        lines = [f"gate: {self.decision}"]
        width = max((len(check.rule) for check in self.checks), default=0)
        for check in self.checks:
            measured = "-" if check.measured is None else f"{check.measured:.6g}"
            detail = f"  {check.detail}" if check.detail else ""
            outcome = check.outcome.upper() if check.outcome == "block" else check.outcome
            lines.append(f"  {outcome:7}  {check.rule:{width}} {measured:>10}  {check.bound} {check.limit:g}{detail}")
        lines += [f"  look at {reason.owner}: {reason.reason} ({reason.rule})" for reason in self.reasons]
        return "\n".join(lines)


def load_rules(path: Path | str, domain: Domain) -> GateRules:
    """Read a rule file. Raises UserError: one line with the file, the key and what is allowed there."""
    return GateRules(read_yaml(path, "gate rules are YAML such as recipes/gate.yaml"), domain, source=str(path))


def judge(rules: GateRules, measurements: Measurements, *, candidate: str = "") -> GateReport:
    """Apply every rule. SHIP only when each one passes, or is skipped for want of a champion."""
    checks: list[Check] = []
    reasons: list[Reason] = []
    for name, rule in rules.rules.items():
        if name not in rules.limits:
            continue
        limit = float(rules.limits[name])
        found = rule.measure(measurements)
        if found.skipped:
            outcome: Literal["pass", "block", "skipped"] = "skipped"
        else:
            outcome = "pass" if _holds(rule, found, limit) else "block"
        missing = found.value is None and not found.skipped
        detail = "not measured" if missing else found.detail
        checks.append(
            Check(rule=name, outcome=outcome, measured=found.value, bound=rule.bound, limit=limit, detail=detail)
        )
        if outcome == "block":
            reason, owner = ("not measured", RELEASE) if missing else (rule.reason, rule.owner)
            reasons.append(Reason(rule=name, reason=reason, owner=owner.name, measured=found.value, limit=limit))
    return GateReport(
        decision="BLOCK" if reasons else "SHIP",
        reasons=tuple(reasons),
        checks=tuple(checks),
        candidate=candidate,
        rules_digest=rules.digest,
    )


def passes(rules: GateRules, name: str, measurements: Measurements) -> bool:
    """Whether the rule of this name holds of what was measured; the others are not asked."""
    rule = rules.rules[name]
    return _holds(rule, rule.measure(measurements), float(rules.limits[name]))


def _holds(rule: Rule, found: _Measured, limit: float) -> bool:
    if found.value is None or found.worse:
        return False
    return found.value >= limit if rule.bound == "at least" else found.value <= limit


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
