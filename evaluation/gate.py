"""The release gate: rules from a YAML file, measurements of one candidate, a decision that names its reasons.

A rule file is a mapping of rule to limit. The domain defines which rules there are (`rules_of`); the limits are the
file's. A rule whose measurement is missing blocks: nothing passes by absence. Only a regression against a champion is
skipped, and reported as such, while there is none.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import read_yaml
from twinloop.domains.domain import Domain
from twinloop.domains.owners import RELEASE
from twinloop.evaluation.parity_report import FORMS
from twinloop.evaluation.rules import OF_A_FORM, PARITY, Bound, Measured, Measurements, Rule, parity_rules, rules_of


@dataclass(frozen=True)
class GateRules:
    """Limits by rule, checked. `source` is where they were read, for messages."""

    limits: Mapping[str, float]
    domain: Domain
    source: str = "gate rules"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown rule or a limit of the wrong type, naming file, key and allowed values."""
        known = f"known rules: {', '.join([*rules_of(self.domain), PARITY])}"
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
        """All that the domain and its forms have, whether there is a limit for them or not."""
        return rules_of(self.domain) | parity_rules(self.domain)

    @property
    def forms(self) -> list[str]:
        """The forms that have a limit."""
        named = [name.split(".", 1)[1].rpartition(".")[0] for name in self.limits if name.startswith(f"{PARITY}.")]
        return list(dict.fromkeys(named))

    def of_parity(self, forms: Collection[str]) -> GateRules | None:
        """The limits of these forms alone; None where there are none."""
        wanted = {f"{PARITY}.{form}.{field}" for form in forms for field in OF_A_FORM}
        limits = {name: limit for name, limit in self.limits.items() if name in wanted}
        return replace(self, limits=limits) if limits else None

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
    limits = read_yaml(path, "gate rules are YAML such as recipes/gate.yaml")
    return GateRules(_flat(limits, str(path)), domain, source=str(path))


def _flat(limits: Any, source: str) -> Any:
    """Limits with those of the key `parity` as rules of their own: {parity: {int8: {tokens: 1}}} is parity.int8.tokens.

    Raises UserError for a form or a field that there is not, and where one is no mapping.
    """
    if not isinstance(limits, Mapping) or PARITY not in limits:
        return limits
    flat = {name: limit for name, limit in limits.items() if name != PARITY}
    for form, fields in _section(limits[PARITY], FORMS, f"{source}: {PARITY}").items():
        for field, limit in _section(fields, OF_A_FORM, f"{source}: {PARITY}.{form}").items():
            flat[f"{PARITY}.{form}.{field}"] = limit
    return flat


def _section(content: Any, known: Collection[str], where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{where}: not a mapping of {', '.join(known)}")
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(
                f"{where}.{name}: unknown; did you mean {near[0]}?"
                if near
                else f"{where}.{name}: unknown; known: {', '.join(known)}"
            )
    return content


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
        detail = ": ".join(filter(None, ("not measured", found.detail))) if missing else found.detail
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


def _holds(rule: Rule, found: Measured, limit: float) -> bool:
    if found.value is None or found.worse:
        return False
    return found.value >= limit if rule.bound == "at least" else found.value <= limit


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
