"""The release gate: rules from a YAML file, measurements of one candidate, a decision that names its reasons.

A rule file is a mapping of rule to limit; the rules it may name stand in RULES. A rule whose measurement is missing
blocks: nothing passes by absence. Only a regression against a champion is skipped, and says so, while there is none.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import read_yaml
from twinloop.evaluation.cases import CaseReport, Comparison
from twinloop.evaluation.metrics import Rate, sign_test
from twinloop.evaluation.router import LATENCY, RELEASE, SIDE_EFFECT

TRAINING = "training data and verifier RL"
EXPORT = "ONNX export"

SIGNIFICANCE = 0.05
"""A loss of cases that chance explains no better than this blocks, however small it is."""


class Measurements(BaseModel):
    """What was measured of a candidate, on the exported artifact. None: not measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    golden: Rate | None = None
    held_out: Rate | None = None
    flip_pairs: Rate | None = None
    injection: Rate | None = None
    side_effect_claims: int | None = None
    champion: Comparison | Literal["none"] | None = None
    """Case by case against the champion; "none" where nothing was ever promoted."""
    parity_logit_gap: float | None = None
    """Largest difference of a logit between the trained network and the engine, by teacher forcing."""
    parity_token_agreement: float | None = None
    """Share of greedy tokens that both choose."""
    p95_ttft_ms: float | None = None
    memory_gib: float | None = None

    @classmethod
    def of_cases(cls, report: CaseReport, **others: Any) -> Measurements:
        """Measurements of a case run, and others by name. A kind that has no cases was not measured."""
        return cls(
            golden=report.kind("golden"),
            held_out=report.kind("held_out"),
            flip_pairs=report.flip_pairs if report.flip_pairs.total else None,
            injection=report.kind("injection"),
            side_effect_claims=report.side_effect_claims,
            **others,
        )


@dataclass(frozen=True)
class _Measured:
    value: float | None
    detail: str = ""
    skipped: bool = False
    worse: bool = False
    """It fails whatever the limit is."""


@dataclass(frozen=True)
class Rule:
    """One thing that a release may be judged by. `bound`: the side of the limit on which it passes."""

    bound: Literal["at least", "at most"]
    allowed: Literal["share", "count", "number"]
    reason: str
    owner: str
    measure: Callable[[Measurements], _Measured]

    def check_limit(self, limit: Any) -> str | None:
        """What a limit must be, where this is not one."""
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool) and math.isfinite(limit)
        if self.allowed == "share":
            return None if number and 0 <= limit <= 1 else "a number from 0 to 1"
        if self.allowed == "count":
            return None if number and isinstance(limit, int) and limit >= 0 else "a whole number, 0 or more"
        return None if number and limit > 0 else "a number more than 0"


def _share(rate: Rate | None) -> _Measured:
    return _Measured(rate.rate, str(rate)) if rate is not None and rate.total else _Measured(None)


def _lower_bound(rate: Rate | None) -> _Measured:
    """A lucky few cases prove little: what counts is the lower end of the interval."""
    return _Measured(rate.interval[0], str(rate)) if rate is not None and rate.total else _Measured(None)


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


RULES: dict[str, Rule] = {
    "golden_pass_rate": Rule(
        "at least", "share", "policy regression", RELEASE.owner, lambda m: _share(m.golden)
    ),
    "side_effect_claims": Rule(
        "at most", "count", "invented side effect", SIDE_EFFECT.owner, lambda m: _number(m.side_effect_claims)
    ),
    "held_out_pass_rate": Rule(
        "at least", "share", "held-out quality below its floor", TRAINING, lambda m: _lower_bound(m.held_out)
    ),
    "flip_pair_pass_rate": Rule(
        "at least", "share", "verdicts do not follow the policy", TRAINING, lambda m: _lower_bound(m.flip_pairs)
    ),
    "injection_pass_rate": Rule(
        "at least", "share", "customers can talk it round", SIDE_EFFECT.owner, lambda m: _lower_bound(m.injection)
    ),
    "champion_net_loss": Rule(
        "at most", "share", "regression against the champion", RELEASE.owner, lambda m: _net_loss(m.champion)
    ),
    "parity_logit_gap": Rule(
        "at most", "number", "export differs from the network", EXPORT, lambda m: _number(m.parity_logit_gap)
    ),
    "parity_token_agreement": Rule(
        "at least", "share", "export differs from the network", EXPORT, lambda m: _number(m.parity_token_agreement)
    ),
    "p95_ttft_ms": Rule(
        "at most", "number", "latency budget exceeded", LATENCY.owner, lambda m: _number(m.p95_ttft_ms)
    ),
    "memory_gib": Rule(
        "at most", "number", "memory budget exceeded", LATENCY.owner, lambda m: _number(m.memory_gib)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class GateRules:
    """Limits by rule, checked. `source` is where they were read, for messages."""

    limits: Mapping[str, float]
    source: str = "gate rules"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown rule or a limit of the wrong type, naming file, key and allowed values."""
        if not isinstance(self.limits, Mapping) or not self.limits:
            raise UserError(f"{self.source}: no rules; a gate without any would ship everything. {_known()}")
        for name, limit in self.limits.items():
            if name not in RULES:
                near = difflib.get_close_matches(str(name), RULES, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"{self.source}: {name}: no such rule; {hint}{_known()}")
            if needed := RULES[name].check_limit(limit):
                raise UserError(f"{self.source}: {name}: {limit!r} is not {needed}")

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
    bound: Literal["at least", "at most"]
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
        for check in self.checks:
            measured = "-" if check.measured is None else f"{check.measured:.6g}"
            detail = f"  {check.detail}" if check.detail else ""
            outcome = check.outcome.upper() if check.outcome == "block" else check.outcome
            lines.append(f"  {outcome:7}  {check.rule:23} {measured:>10}  {check.bound} {check.limit:g}{detail}")
        lines += [f"  look at {reason.owner}: {reason.reason} ({reason.rule})" for reason in self.reasons]
        return "\n".join(lines)


def load_rules(path: Path | str) -> GateRules:
    """Read a rule file. Raises UserError: one line with the file, the key and what is allowed there."""
    return GateRules(read_yaml(path, "gate rules are YAML such as recipes/gate.yaml"), source=str(path))


def judge(rules: GateRules, measurements: Measurements, *, candidate: str = "") -> GateReport:
    """Apply every rule. SHIP only when each one passes, or is skipped for want of a champion."""
    checks: list[Check] = []
    reasons: list[Reason] = []
    for name, rule in RULES.items():
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
            reason, owner = ("not measured", RELEASE.owner) if missing else (rule.reason, rule.owner)
            reasons.append(Reason(rule=name, reason=reason, owner=owner, measured=found.value, limit=limit))
    return GateReport(
        decision="BLOCK" if reasons else "SHIP",
        reasons=tuple(reasons),
        checks=tuple(checks),
        candidate=candidate,
        rules_digest=rules.digest,
    )


def _holds(rule: Rule, found: _Measured, limit: float) -> bool:
    if found.value is None or found.worse:
        return False
    return found.value >= limit if rule.bound == "at least" else found.value <= limit


def _known() -> str:
    return f"known rules: {', '.join(RULES)}"


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
