"""How a task judges answers: verdicts, their predicates, kinds of cases, and numbers over all cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from twinloop.domains.owners import RELEASE, TRAINING, UNKNOWN, Owner


@dataclass(frozen=True)
class Verdict:
    """A judged answer.

    checks: one boolean for each predicate of the domain. reasons: for each check that failed, why, in words for people.
    output: the answer as data (an object, a label, a number); None where it has not the form that is wanted, and then
    `parsed` is False. reward: of RL, from 0 to 1; an answer with reward 1 passes.
    """

    checks: Mapping[str, bool]
    reward: float
    reasons: Mapping[str, str] = field(default_factory=dict)
    output: Any = None
    parsed: bool = True

    @classmethod
    def of(cls, checks: Mapping[str, bool], *, output: Any, reasons: Mapping[str, str] | None = None) -> Verdict:
        """A verdict whose reward is 1 only when every check holds."""
        return cls(checks, float(all(checks.values())), reasons or {}, output)

    @classmethod
    def unparsed(cls, checks: Mapping[str, bool], reason: str) -> Verdict:
        """An answer that has not the form that is wanted. `checks` must hold `parsed`: False."""
        return cls(checks, 0.0, {"parsed": reason}, parsed=False)

    @property
    def passed(self) -> bool:
        return self.reward == 1

    @property
    def failed(self) -> tuple[str, ...]:
        """The checks that do not hold."""
        return tuple(name for name, holds in self.checks.items() if not holds)


@dataclass(frozen=True)
class Predicate:
    """One thing that must hold of an answer.

    critical: a release with a single violation in any case is blocked by the rule `<name>_violations`. It is judged on
    unparsed answers too: one whose verdict does not report that it holds is a violation. reason: the message of that
    rule when it fails. meaning: what holds, in a few words, for the legend of tables.
    """

    title: str
    owner: Owner = UNKNOWN
    critical: bool = False
    reason: str = "an answer that is never allowed"
    meaning: str = ""


@dataclass(frozen=True)
class CaseKind:
    """A kind of evaluation case; the gate has the rule `<kind>_pass_rate` for it.

    judged_by: `share` compares the pass rate itself (regression cases, where no exception is allowed); `lower_bound`
    the lower end of its 95% interval. pairs: cases share a `pair_id`, and a pair passes when both of its sides do.
    reason: the message of a failed rule. A measurement of a part of the cases always includes the `regression` kinds.
    """

    title: str
    judged_by: Literal["share", "lower_bound"] = "lower_bound"
    pairs: bool = False
    owner: Owner = TRAINING
    reason: str = "quality below its limit"
    regression: bool = False


GOLDEN = CaseKind(
    "regression cases", judged_by="share", owner=RELEASE, reason="regression in a golden case", regression=True
)
HELD_OUT = CaseKind("held-out cases", reason="held-out quality below its limit")
STANDARD_KINDS: Mapping[str, CaseKind] = {"golden": GOLDEN, "held_out": HELD_OUT}


@dataclass(frozen=True)
class Judged:
    """One case with its answers and verdicts.

    reference: its reference answer, where it has one. greedy, greedy_verdict: the greedy answer. confidence: the
    model's probability of that whole answer, where it was recorded. outputs, verdicts: all that were sampled where the
    recipe's `evaluate.samples` is more than 1, or else the greedy one.
    """

    kind: str
    facts: Any
    expected: Mapping[str, Any]
    reference: str | None
    greedy: str
    greedy_verdict: Verdict
    confidence: float | None
    outputs: Sequence[str]
    verdicts: Sequence[Verdict]


@dataclass(frozen=True)
class Statistic:
    """A number over all cases that is a function of sums over the cases, such as a mean, an F score, BLEU.

    So its interval is found by drawing cases, without computing what a case adds a second time. terms(case): what the
    case adds to the sums, by name; None: the case does not count. value(sums): the number, of one case or more, where
    a name that no case has is missing; None where the sums give none. mean: whether it is the mean of one value from 0
    to 1 a case (`domains.metrics.mean`): a share, whose interval is Wilson's. range: the least and the most that any
    cases can have; with it, few cases that are all alike are no proof of the next one.
    """

    terms: Callable[[Judged], Mapping[Any, float] | None]
    value: Callable[[Mapping[Any, float]], float | None]
    mean: bool = False
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Metric:
    """A number over all cases; the gate has a rule of its name.

    of: what it is. `domains.metrics` has ready-made ones (`bleu()`, `pass_at(4)`), and a Statistic of one's own makes
    another; None: the domain computes it in `Domain.measure`, and it has no interval. judged_by: `interval` compares
    the end of its 95% interval that is nearer to the limit, as for pass rates; `value` the number itself.
    """

    title: str
    bound: Literal["at least", "at most"] = "at least"
    owner: Owner = TRAINING
    share: bool = False
    """Whether it lies between 0 and 1, and so must its limit."""
    of: Statistic | None = None
    judged_by: Literal["interval", "value"] = "interval"
