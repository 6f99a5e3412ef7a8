"""Is the verifier fit to give rewards? Before any RL it judges gold answers, and wrong ones that look right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from twinloop.domains.domain import Domain, domain_code

MAX_MISJUDGED = 100
"""Misjudged outputs kept word for word; all are counted."""
NEEDED = ("verify", "gold", "wrong")
"""What a domain must define before its verifier can be audited."""


class Misjudged(BaseModel):
    """An output that the verifier judged wrongly. case: the index of the facts that it was judged by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["gold", "wrong"]
    name: str
    case: int
    output: str
    why: str


class AuditReport(BaseModel):
    """What the verifier judged. `tried` and `exploits` count wrong outputs by name: all, and those it accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gold_answers: int
    gold_rejected: int
    tried: dict[str, int]
    exploits: dict[str, int]
    unparsed: int
    """Wrong outputs rejected because they have not the form of an answer."""
    misjudged: tuple[Misjudged, ...]

    @property
    def passed(self) -> bool:
        """Every gold answer was accepted and nothing else; an audit that tried nothing has not passed."""
        return self.gold_answers > 0 and bool(self.tried) and not self.gold_rejected and not self.exploits

    @property
    def summary(self) -> str:
        """One line for people."""
        wrong = sum(self.tried.values())
        if self.passed:
            return f"verifier audit passed: {self.gold_answers} gold answers accepted, {wrong} wrong answers rejected"
        if not self.gold_answers or not self.tried:
            return "verifier audit failed: nothing was tried; give it cases, and `wrong` answers to them"
        exploits = ", ".join(f"{name} ({count})" for name, count in sorted(self.exploits.items())) or "none"
        return (
            f"verifier audit failed: {self.gold_rejected} of {self.gold_answers} gold answers rejected; "
            f"exploits (wrong answers with a reward above 0): {exploits}"
        )


def audit_verifier(domain: Domain, facts: Iterable[Any]) -> AuditReport:
    """Try the gold answer and every wrong one of each case on the domain's verifier.

    A gold answer must get 1, everything else 0: whatever else it accepted, RL would find, which is reward hacking. A
    verifier that raises has failed on that output too: during RL it would stop the run, on an output of the model's
    choosing. Raises UserError where `gold` or `wrong` raises.
    """
    tried: Counter[str] = Counter()
    exploits: Counter[str] = Counter()
    misjudged: list[Misjudged] = []
    count = rejected = unparsed = 0

    for index, about in enumerate(facts):
        count += 1
        prompt = f"prompt {count}"
        with domain_code(domain, "gold", prompt):
            gold = domain.gold(about)
        reward, why, _ = _judge(domain, gold, about)
        if reward != 1:
            rejected += 1
            misjudged.append(Misjudged(kind="gold", name="gold answer", case=index, output=gold, why=why))
        with domain_code(domain, "wrong", prompt):
            wrong = list(domain.wrong(gold, about))
        for name, output in wrong:
            tried[name] += 1
            reward, why, parsed = _judge(domain, output, about)
            unparsed += not parsed
            if reward != 0:
                exploits[name] += 1
                misjudged.append(Misjudged(kind="wrong", name=name, case=index, output=output, why=why or "accepted"))
    return AuditReport(
        gold_answers=count,
        gold_rejected=rejected,
        tried=dict(sorted(tried.items())),
        exploits=dict(sorted(exploits.items())),
        unparsed=unparsed,
        misjudged=tuple(misjudged[:MAX_MISJUDGED]),
    )


def _judge(domain: Domain, output: str, facts: Any) -> tuple[float | None, str, bool]:
    """(reward, why not 1, parsed); no reward at all where the verifier raised."""
    try:
        verdict = domain.verify(output, facts)
    except Exception as error:  # whatever it is, it is a finding of the audit
        return None, f"the verifier raised {type(error).__name__}: {error}", True
    return verdict.reward, "; ".join(verdict.reasons.values()), verdict.parsed
