"""What the gate will say for certain before anything is trained: with too few cases a rule cannot pass.

Pass rates are judged by the lower end of their interval, so every limit needs a number of cases even where all answers
are right; what no case or text measures blocks. All of it is asked of the gate's own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Judged, domain_code
from twinloop.evaluation.cases import Case, reference_answers, reference_of
from twinloop.evaluation.estimates import measured
from twinloop.evaluation.gate import GateRules, passes
from twinloop.evaluation.metrics import Estimate, Rate, wilson_interval
from twinloop.evaluation.rewards import ACCURACY, PAIR
from twinloop.evaluation.rules import REFERENCE, REWARD, TEXTS, Measurements
from twinloop.models.config import Kind

MOST_CASES = 1_000_000
"""A limit that so many right answers do not pass, none does."""

_NEVER: Mapping[Kind, str] = {
    "text": "it is of reward models, and the release writes text",
    "labels": "the release gives labels, of which it is not measured",
    "reward": "the release is a reward model, of which it is not measured",
}


@dataclass(frozen=True)
class Prospect:
    """A rule on the pass rate of a kind, and what the cases at hand can come to."""

    rule: str
    limit: float
    kind: str
    unit: str
    """What is counted: cases, pairs or held-out prompts."""
    cases: int
    right: int | None
    """How many of the cases must be right; None: all of them are not enough."""
    needed: int | None
    """The fewest cases that are enough, all of them right; None: no number is."""
    best: float
    """What is measured where all are right."""

    def __str__(self) -> str:
        wrong = self.cases - (self.right or 0)
        return (
            f"{self.rule}: at least {self.limit:g}, which is {self.right} of the {self.cases} {self.unit} right, "
            f"{wrong} wrong at most; it takes {self.needed} {self.unit} or more"
        )

    @property
    def impossible(self) -> str | None:
        """Why the rule cannot pass, and what to do."""
        if self.right is not None:
            return None
        if self.needed is None:
            return f"{self.rule}: no number of {self.unit} reaches {self.limit:g}; lower the limit"
        enough = f"{self.needed} or more are needed: add {self.unit}, or change the rule"
        of_kind = f"{self.unit} of kind {self.kind}"
        if not self.cases:
            return f"{self.rule}: there are no {of_kind}, and what is not measured blocks; {enough}"
        reached = f"{self.cases} {of_kind}, all right, reach {self.best:.3f}"
        return f"{self.rule}: {reached}, and the limit is {self.limit:g}; {enough}"


@dataclass(frozen=True)
class Outlook:
    """prospects: of the rules that can pass. warnings: of metrics that right answers would not pass."""

    prospects: tuple[Prospect, ...]
    warnings: tuple[str, ...]

    def text(self) -> str:
        """Empty where no rule asks anything of the cases."""
        if not self.prospects:
            return ""
        return "\n".join(["what the gate will ask of what is at hand:", *(f"  {one}" for one in self.prospects)])


def foresee(
    rules: GateRules,
    cases: Sequence[Case],
    *,
    has_texts: bool,
    samples: int = 1,
    kind: Kind = "text",
    held_out_prompts: int = 0,
) -> Outlook:
    """What the rules will need of a model of this kind. has_texts: whether there are held-out texts. samples: answers a
    case. held_out_prompts: of preferences, on which a reward model is measured.

    Raises UserError, one line, for rules that cannot pass whatever is trained.
    """
    unmeasured = [name for name in rules.limits if name in _never_measured(rules.domain, kind)]
    every = [_accuracy_prospect(rules, held_out_prompts)] if kind == "reward" and ACCURACY in rules.limits else []
    every += _prospects(rules, cases) if kind != "reward" else []
    problems = [f"{name}: {_NEVER[kind]}; take the rule out" for name in unmeasured]
    problems += [reason for one in every if (reason := one.impossible)]
    if kind == "text" and not has_texts:
        problems += [
            f"{name}: there is no corpus_heldout to measure it on; add it, or take the rule out"
            for name in TEXTS
            if name in rules.limits
        ]
    of_answers = [name for name in REFERENCE if name in rules.limits]
    if kind == "text" and of_answers and not reference_answers(rules.domain, cases):
        problems += [f"{name}: no case has a reference answer; add one, or take the rule out" for name in of_answers]
    if problems:
        raise UserError(f"{rules.source}: no model can pass: {'; '.join(problems)}")
    return Outlook(tuple(every), tuple(_warnings(rules, cases, samples)) if kind != "reward" else ())


def _never_measured(domain: Domain, kind: Kind) -> set[str]:
    """Rules on what `tasks.measure` does not measure of such a model, so that they block it."""
    if kind == "text":
        return {*REWARD}
    of_texts = {*TEXTS, *REFERENCE}
    if kind == "labels":
        return of_texts | {*REWARD}
    of_answers = {*domain.metrics, *(f"{name}_pass_rate" for name in domain.case_kinds)}
    return of_texts | of_answers | {f"{name}_violations" for name in domain.critical}


def _accuracy_prospect(rules: GateRules, prompts: int) -> Prospect:
    def rated(right: int, of: int) -> Measurements:
        found = Estimate(value=right / of, interval=wilson_interval(right, of)) if of else None
        return Measurements(metrics={ACCURACY: found} if found else {})

    return _judged_by(rules, ACCURACY, rated, kind=PAIR, unit="held-out prompts", count=prompts)


def _prospects(rules: GateRules, cases: Sequence[Case]) -> list[Prospect]:
    limited = [kind for kind in rules.domain.case_kinds if f"{kind}_pass_rate" in rules.limits]
    return [_prospect(rules, kind, [case for case in cases if case.kind == kind]) for kind in limited]


def _prospect(rules: GateRules, kind: str, cases: Sequence[Case]) -> Prospect:
    """cases: of this kind."""
    name = f"{kind}_pass_rate"
    pairs = rules.domain.case_kinds[kind].pairs
    count = len({case.pair_id or case.case_id for case in cases}) if pairs else len(cases)

    def rated(right: int, of: int) -> Measurements:
        return Measurements(rates={kind: Rate(successes=right, total=of)})

    return _judged_by(rules, name, rated, kind=kind, unit="pairs" if pairs else "cases", count=count)


def _judged_by(
    rules: GateRules, name: str, rated: Callable[[int, int], Measurements], *, kind: str, unit: str, count: int
) -> Prospect:
    """rated: what is measured where so many are right, of so many."""
    return Prospect(
        rule=name,
        limit=float(rules.limits[name]),
        kind=kind,
        unit=unit,
        cases=count,
        right=_smallest(lambda right: passes(rules, name, rated(right, count)), 0, count),
        needed=_smallest(lambda total: passes(rules, name, rated(total, total)), 1, MOST_CASES),
        best=rules.rules[name].measure(rated(count, count)).value or 0.0,
    )


def _smallest(holds: Callable[[int], bool], first: int, last: int) -> int | None:
    """The smallest number from which on it holds."""
    if not holds(last):
        return None
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if holds(middle) else (middle + 1, last)
    return last


def _warnings(rules: GateRules, cases: Sequence[Case], samples: int) -> list[str]:
    """Of the domain's own metrics: what they are where every answer is the gold answer, which no rule should block."""
    domain = rules.domain
    limited = [name for name in domain.metrics if name in rules.limits]
    if not limited or not domain.has("gold") or not domain.has("verify"):
        return []
    judged = []
    for case in cases:
        with domain_code(domain, "gold", f"case {case.case_id}"):
            gold = domain.gold(case.facts)
        with domain_code(domain, "verify", f"case {case.case_id}"):
            verdict = domain.verify(gold, case.facts)
        judged.append(
            Judged(
                kind=case.kind,
                facts=case.facts,
                expected=case.expected,
                reference=reference_of(domain, case),
                greedy=gold,
                greedy_verdict=verdict,
                confidence=1.0,
                outputs=[gold] * samples,
                verdicts=[verdict] * samples,
            )
        )
    found, best = [], measured(domain, judged)
    for name in limited:
        if name not in best:
            found.append(f"{rules.source}: {name} is not measured where every answer is right, and that would block")
        elif not passes(rules, name, Measurements(metrics=best)):
            found.append(f"{rules.source}: {name} is {best[name]} where every answer is right, and blocks")
    return found
