"""Is the verifier fit to pay rewards? Before any RL, wrong answers that look right are tried on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from twinloop.domains.domain import Verdict

FactsT = TypeVar("FactsT")
MAX_SLIPS = 100
"""Slips kept word for word; all are counted."""


class Slip(BaseModel):
    """An output that the verifier judged wrongly. `good` is the index of the good answer that it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["good", "mutation", "shortcut"]
    name: str
    good: int
    output: str
    why: str


class AuditReport(BaseModel):
    """What was tried, and what slipped through. `tried` and `slipped` count outputs by name of mutation or shortcut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    goods: int
    goods_refused: int
    tried: dict[str, int]
    slipped: dict[str, int]
    unparsed: int
    """Wrong outputs refused because they are not a decision at all."""
    slips: tuple[Slip, ...]

    @property
    def passed(self) -> bool:
        """Every good answer was paid, no other one was; an audit that tried nothing proves nothing."""
        return self.goods > 0 and bool(self.tried) and not self.goods_refused and not self.slipped

    @property
    def summary(self) -> str:
        """One line for people."""
        wrong = sum(self.tried.values())
        if self.passed:
            return f"verifier audit passed: {self.goods} good answers paid, {wrong} wrong ones refused"
        if not self.goods or not self.tried:
            return "verifier audit failed: nothing was tried; give it good answers and their mutations"
        slipped = ", ".join(f"{name} ({count})" for name, count in sorted(self.slipped.items())) or "none"
        return (
            f"verifier audit failed: {self.goods_refused} of {self.goods} good answers refused; "
            f"wrong answers that were paid: {slipped}"
        )


def audit_verifier(
    verify: Callable[[str, FactsT], Verdict],
    goods: Iterable[tuple[str, FactsT]],
    mutate: Callable[[str, FactsT], Iterable[tuple[str, str]]],
    shortcuts: Callable[[FactsT], Iterable[tuple[str, str]]],
) -> AuditReport:
    """Try every good answer, all its mutations and all shortcuts of its case on the verifier.

    A good answer must get 1, everything else 0. A verifier that raises has failed on that output too: during RL it
    would stop the run, on an output of the model's choosing.
    """
    tried: Counter[str] = Counter()
    slipped: Counter[str] = Counter()
    slips: list[Slip] = []
    count = refused = unparsed = 0

    for index, (good, facts) in enumerate(goods):
        count += 1
        reward, why, _ = _judge(verify, good, facts)
        if reward != 1:
            refused += 1
            slips.append(Slip(kind="good", name="good answer", good=index, output=good, why=why))
        wrong: list[tuple[Literal["mutation", "shortcut"], str, str]] = []
        wrong += [("mutation", name, output) for name, output in mutate(good, facts)]
        wrong += [("shortcut", name, output) for name, output in shortcuts(facts)]
        for kind, name, output in wrong:
            tried[name] += 1
            reward, why, parsed = _judge(verify, output, facts)
            unparsed += not parsed
            if reward != 0:
                slipped[name] += 1
                slips.append(Slip(kind=kind, name=name, good=index, output=output, why=why or "paid"))
    return AuditReport(
        goods=count,
        goods_refused=refused,
        tried=dict(sorted(tried.items())),
        slipped=dict(sorted(slipped.items())),
        unparsed=unparsed,
        slips=tuple(slips[:MAX_SLIPS]),
    )


def _judge(verify: Callable[[str, FactsT], Verdict], output: str, facts: FactsT) -> tuple[float | None, str, bool]:
    """(reward, why not 1, parsed); no reward at all where the verifier raised."""
    try:
        verdict = verify(output, facts)
    except Exception as error:  # whatever it is, it is a finding of the audit
        return None, f"the verifier raised {type(error).__name__}: {error}", True
    return verdict.reward, "; ".join(verdict.reasons.values()), verdict.parsed
