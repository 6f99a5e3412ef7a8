"""Run cases through the engine that ships, judge every answer, keep every failure with its owner."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Judged, Message, Verdict, domain_code
from twinloop.evaluation.metrics import Rate
from twinloop.evaluation.router import Failure, route
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import SamplingParams

BATCH = 128
"""Prompts handed to the engine at once: enough to keep its slots busy, few enough to show progress."""
SAMPLING_SEED = 0
"""Of sampled answers: all models draw alike, so that two of them differ by their weights alone."""


class Completion(Protocol):
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str: ...


class Generator(Protocol):
    """The part of serving.engine.Engine that this needs."""

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, *, group: int = 1, first_sequence: int = 0
    ) -> Sequence[Completion]: ...


@dataclass(frozen=True)
class Case:
    """One prompt, and the trusted facts by which its answer is judged. Both sides of a pair share a `pair_id`."""

    case_id: str
    kind: str
    prompt: tuple[dict[str, str], ...]
    facts: Any
    pair_id: str | None
    expected: dict[str, Any]
    digest: str
    """Sha256 of the record."""


@dataclass(frozen=True)
class Answering:
    """How cases are answered.

    max_tokens: of an answer. samples: 1 answers greedily and no more; with n > 1, n answers a case are also sampled at
    `temperature`, for the domain's metrics (pass@k). Whether a case passes is always a matter of its greedy answer.
    """

    max_tokens: int
    samples: int = 1
    temperature: float = 1.0


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CaseResult(_Record):
    case_id: str
    kind: str
    pair_id: str | None
    passed: bool


class CaseFailure(_Record):
    """A wrong answer, whole. `failed` names the predicates that do not hold; `owner` is the layer that looks at it."""

    case_id: str
    kind: str
    pair_id: str | None
    output: str
    finish_reason: str
    failed: tuple[str, ...]
    reasons: tuple[str, ...]
    expected: dict[str, Any]
    owner: str
    next_action: str


class CaseReport(_Record):
    """What the cases showed. An unparsed answer fails every predicate, except critical ones that its verdict holds."""

    cases_digest: str
    """Equal for two reports on the same cases: only then are they comparable case by case."""
    overall: Rate
    by_kind: dict[str, Rate]
    pairs: dict[str, Rate]
    """Pairs by kind, of kinds that have them; a pair passes when both its sides do."""
    by_predicate: dict[str, Rate]
    violations: dict[str, int]
    """Answers, sampled ones too, by the critical predicate that they violate."""
    measured: dict[str, float]
    """The domain's own metrics, by name."""
    details: dict[str, Any] = {}
    """What else the domain reports, such as a confusion matrix."""
    unparsed: int
    truncated: int
    """Answers that ran into max_tokens."""
    results: tuple[CaseResult, ...]
    failures: tuple[CaseFailure, ...]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a tracker."""
        rates = {"pass_rate": self.overall}
        rates |= {f"pairs/{kind}": rate for kind, rate in self.pairs.items()}
        rates |= {f"kind/{kind}": rate for kind, rate in self.by_kind.items()}
        rates |= {f"predicate/{name}": rate for name, rate in self.by_predicate.items()}
        numbers = {name: rate.rate for name, rate in rates.items() if rate.total}
        numbers |= {f"{name}_low": rate.interval[0] for name, rate in rates.items() if rate.total}
        numbers |= {f"violations/{name}": count for name, count in self.violations.items()}
        counts = {"cases": self.overall.total, "unparsed": self.unparsed, "truncated": self.truncated}
        return numbers | self.measured | counts


class Comparison(_Record):
    """Two models on the same cases: how many only the champion passes (lost), how many only the candidate (won)."""

    champion: str
    lost: int
    won: int
    total: int


def read_cases(records: Iterable[Mapping[str, Any]], domain: Domain) -> list[Case]:
    """Cases from their records.

    Raises UserError for two cases of one id, for a pair that has not exactly two sides, and where `read_facts` raises.
    """
    cases = [
        Case(
            case_id=record["case_id"],
            kind=record["kind"],
            prompt=tuple(dict(message) for message in record["prompt"]),
            facts=_facts(domain, record),
            pair_id=record.get("pair_id"),
            expected=dict(record.get("expected") or {}),
            digest=hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest(),
        )
        for record in records
    ]
    ids = Counter(case.case_id for case in cases)
    if repeated := [case_id for case_id, count in ids.items() if count > 1]:
        raise UserError(f"cases: case_id {repeated[0]} appears {ids[repeated[0]]} times; give every case its own")
    sides = Counter(case.pair_id for case in cases if case.pair_id is not None)
    if broken := [pair_id for pair_id, count in sides.items() if count != 2]:
        raise UserError(f"cases: pair {broken[0]} has {sides[broken[0]]} sides; a pair needs exactly two")
    return cases


def run_cases(
    engine: Generator,
    tokenizer: ChatTokenizer,
    cases: Sequence[Case],
    domain: Domain,
    answering: Answering,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> CaseReport:
    """Answer every case and judge the answers. `on_progress` is called with (done, total) after each batch.

    The cases of a domain without a verifier are not answered, and the report is empty. Raises UserError when there are
    no cases, and where a method of the domain raises or returns what it must not.
    """
    if not cases:
        raise UserError("cases: there are none to run; a model cannot be judged without them")
    if not domain.has("verify"):
        return _report([], domain)
    greedy = SamplingParams(max_tokens=answering.max_tokens, stop=(tokenizer.stop_id,))
    drawn = replace(greedy, temperature=answering.temperature, seed=SAMPLING_SEED)
    several = answering.samples if answering.samples > 1 else 0
    answered: list[_Answered] = []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        prompts = [tokenizer.encode_prompt(case.prompt) for case in batch]
        completions = engine.generate(prompts, greedy)
        sampled: Sequence[Completion] = []
        if several:
            sampled = engine.generate(prompts, drawn, group=several, first_sequence=start * several)
        for index, (case, completion) in enumerate(zip(batch, completions, strict=True)):
            outputs = [tokenizer.decode(completion.tokens)]
            outputs += [tokenizer.decode(one.tokens) for one in sampled[index * several : (index + 1) * several]]
            verdicts = [_verdict(domain, output, case) for output in outputs]
            answered.append(_Answered(case, outputs, verdicts, completion.finish_reason))
        if on_progress:
            on_progress(len(answered), len(cases))
    return _report(answered, domain)


def reference_answers(domain: Domain, cases: Sequence[Case]) -> list[tuple[Sequence[Message], str]]:
    """(prompt, reference answer) of each case that has one. Raises UserError where `reference` raises."""
    answers: list[tuple[Sequence[Message], str]] = []
    for case in cases:
        with domain_code(domain, "reference", f"case {case.case_id}"):
            answer = domain.reference(case.expected)
        if answer is not None:
            answers.append((case.prompt, answer))
    return answers


def _facts(domain: Domain, record: Mapping[str, Any]) -> Any:
    with domain_code(domain, "read_facts", f"case {record['case_id']}"):
        return domain.read_facts(record)


def _verdict(domain: Domain, output: str, case: Case) -> Verdict:
    with domain_code(domain, "verify", f"case {case.case_id}"):
        verdict = domain.verify(output, case.facts)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"returned {verdict!r}, which is no Verdict")
        return verdict


def compare(candidate: CaseReport, champion: CaseReport, *, version: str) -> Comparison:
    """Case by case, what the candidate lost and won against the champion, whose version is named.

    Raises ValueError where the two did not answer the same cases: the champion must then be run on today's first.
    """
    if candidate.cases_digest != champion.cases_digest:
        raise ValueError(f"the candidate and champion {version} were run on different cases")
    before = {result.case_id: result.passed for result in champion.results}
    lost = sum(before[r.case_id] and not r.passed for r in candidate.results)
    won = sum(r.passed and not before[r.case_id] for r in candidate.results)
    return Comparison(champion=version, lost=lost, won=won, total=len(before))


@dataclass(frozen=True)
class _Answered:
    """A case, its greedy answer, and sampled ones behind it."""

    case: Case
    outputs: Sequence[str]
    verdicts: Sequence[Verdict]
    finish_reason: str
    """Of the greedy answer."""

    @property
    def verdict(self) -> Verdict:
        return self.verdicts[0]

    @property
    def judged(self) -> Judged:
        first = 1 if len(self.outputs) > 1 else 0
        case = self.case
        return Judged(case.kind, case.facts, case.expected, self.outputs[first:], self.verdicts[first:])


def _report(answered: Sequence[_Answered], domain: Domain) -> CaseReport:
    results = tuple(
        CaseResult(case_id=one.case.case_id, kind=one.case.kind, pair_id=one.case.pair_id, passed=one.verdict.passed)
        for one in answered
    )
    verdicts = [one.verdict for one in answered]
    kinds = [kind for kind in domain.case_kinds if any(result.kind == kind for result in results)]
    judged = [one.judged for one in answered]
    digests = sorted(one.case.digest for one in answered)
    return CaseReport(
        cases_digest=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        overall=Rate.of([result.passed for result in results]),
        by_kind={kind: Rate.of([result.passed for result in results if result.kind == kind]) for kind in kinds},
        pairs={kind: _pairs(results, kind) for kind in kinds if domain.case_kinds[kind].pairs},
        by_predicate={
            name: Rate.of([verdict.checks.get(name, False) for verdict in verdicts]) for name in domain.predicates
        },
        violations={
            name: sum(not verdict.checks.get(name, False) for one in answered for verdict in one.verdicts)
            for name in domain.critical
        },
        measured=_measured(domain, judged),
        details=_details(domain, judged),
        unparsed=sum(not verdict.parsed for verdict in verdicts),
        truncated=sum(one.finish_reason == "length" for one in answered),
        results=results,
        failures=tuple(_failure(one, domain) for one in answered if not one.verdict.passed),
    )


def _measured(domain: Domain, judged: Sequence[Judged]) -> dict[str, float]:
    with domain_code(domain, "measure"):
        measured = dict(domain.measure(judged))
    for name, value in measured.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(
                f"domain {domain.name}: measure returned {value!r} as {name}, which is no finite number; leave out a "
                "metric that cannot be computed"
            )
    return {name: float(value) for name, value in measured.items()}


def _details(domain: Domain, judged: Sequence[Judged]) -> dict[str, Any]:
    with domain_code(domain, "report"):
        details = dict(domain.report(judged))
        to_json(details)  # raises for what JSON cannot hold
        return details


def _pairs(results: Sequence[CaseResult], kind: str) -> Rate:
    pairs: dict[str | None, bool] = {}
    for result in results:
        if result.kind == kind:
            name = result.pair_id or result.case_id  # a case of its own is judged alone
            pairs[name] = pairs.get(name, True) and result.passed
    return Rate.of(list(pairs.values()))


def _failure(one: _Answered, domain: Domain) -> CaseFailure:
    case, verdict = one.case, one.verdict
    fields = verdict.output if isinstance(verdict.output, Mapping) else {}
    owner = route(
        Failure(
            failed_predicates=frozenset(verdict.failed),
            missing_fields=tuple(name for name, value in fields.items() if value == ""),
            release_regression=domain.case_kinds[case.kind].regression,
        ),
        domain,
    )
    return CaseFailure(
        case_id=case.case_id,
        kind=case.kind,
        pair_id=case.pair_id,
        output=one.outputs[0],
        finish_reason=one.finish_reason,
        failed=verdict.failed,
        reasons=tuple(verdict.reasons.values()),
        expected=case.expected,
        owner=owner.name,
        next_action=owner.next_action,
    )
