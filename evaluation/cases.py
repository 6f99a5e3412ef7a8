"""Run cases through the engine that ships, judge every answer, keep every failure with its owner."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Protocol

from pydantic_core import to_json

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Judged, Message, Verdict, domain_code
from twinloop.evaluation.case_report import CaseFailure, CaseReport, CaseResult, CaseSample, Comparison
from twinloop.evaluation.estimates import measured
from twinloop.evaluation.metrics import Rate
from twinloop.evaluation.router import Failure, route
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.answer_form import form_grammar, stated_form
from twinloop.serving.engine.sampling import SamplingParams

BATCH = 128
"""Prompts handed to the engine at once: enough to keep its slots busy, few enough to show progress."""
SAMPLES = 10
"""Answers that a report keeps whole, right or wrong, of the same cases for every model."""
MOST_OUTCOMES = 20
"""More of them are no classes, and no matrix that a person reads."""
NO_OUTCOME = "no answer"
"""Of an answer that does not parse."""
SAMPLING_SEED = 0
"""Of sampled answers: all models draw alike, so that two of them differ by their weights alone."""


class Completion(Protocol):
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
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


def read_cases(records: Iterable[Mapping[str, Any]], domain: Domain) -> list[Case]:
    """Cases from their records.

    Raises UserError for two cases of one id, for a pair that has not exactly two sides, and where `read_facts` raises.
    """
    cases = [
        Case(
            case_id=record["case_id"],
            kind=record["kind"],
            prompt=tuple(dict(message) for message in record["prompt"]),
            facts=facts_of(domain, record),
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

    They keep to the domain's `answer_form`, greedy and sampled ones, as those that are served.
    Of the cases of a domain without a verifier only the samples are answered, and none is judged. Raises UserError when
    there are no cases, and where a method of the domain raises or returns what it must not.
    """
    if not cases:
        raise UserError("cases: there are none to run; a model cannot be judged without them")
    grammar = form_grammar(stated_form(domain), tokenizer)
    greedy = SamplingParams(max_tokens=answering.max_tokens, stop=tokenizer.stop_ids, constraint=grammar)
    if not domain.has("verify"):
        shown = _sampled(cases)
        completions = engine.generate([tokenizer.encode_prompt(case.prompt) for case in shown], greedy)
        samples = [
            _sample(case, tokenizer.decode(completion.tokens), None)
            for case, completion in zip(shown, completions, strict=True)
        ]
        return _report([], domain).model_copy(update={"samples": tuple(samples)})
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
            verdicts = [verdict_of(domain, output, case) for output in outputs]
            confidence = math.exp(math.fsum(completion.logprobs))
            answered.append(_Answered(case, outputs, verdicts, completion.finish_reason, confidence))
        if on_progress:
            on_progress(len(answered), len(cases))
    return _report(answered, domain)


def reference_answers(domain: Domain, cases: Sequence[Case]) -> list[tuple[Sequence[Message], str]]:
    """(prompt, reference answer) of each case that has one. Raises UserError where `reference` raises."""
    answers = [(case.prompt, reference_of(domain, case)) for case in cases]
    return [(prompt, answer) for prompt, answer in answers if answer is not None]


def reference_of(domain: Domain, case: Case) -> str | None:
    """Raises UserError where `reference` raises."""
    with domain_code(domain, "reference", f"case {case.case_id}"):
        return domain.reference(case.expected)


def facts_of(domain: Domain, record: Mapping[str, Any]) -> Any:
    """What is trusted about a case. Raises UserError where `read_facts` raises."""
    with domain_code(domain, "read_facts", f"case {record['case_id']}"):
        return domain.read_facts(record)


def verdict_of(domain: Domain, output: str, case: Case) -> Verdict:
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
    """Of the greedy answer, as is the confidence."""
    confidence: float

    @property
    def verdict(self) -> Verdict:
        return self.verdicts[0]

    def judged(self, domain: Domain) -> Judged:
        first = 1 if len(self.outputs) > 1 else 0
        case = self.case
        return Judged(
            kind=case.kind,
            facts=case.facts,
            expected=case.expected,
            reference=reference_of(domain, case),
            greedy=self.outputs[0],
            greedy_verdict=self.verdict,
            confidence=min(self.confidence, 1.0),  # rounding makes it a little more
            outputs=self.outputs[first:],
            verdicts=self.verdicts[first:],
        )


def _report(answered: Sequence[_Answered], domain: Domain) -> CaseReport:
    results = tuple(
        CaseResult(
            case_id=one.case.case_id,
            kind=one.case.kind,
            pair_id=one.case.pair_id,
            passed=one.verdict.passed,
            confidence=one.confidence,
        )
        for one in answered
    )
    shown = {case.case_id for case in _sampled([one.case for one in answered])}
    verdicts = [one.verdict for one in answered]
    kinds = [kind for kind in domain.case_kinds if any(result.kind == kind for result in results)]
    judged = [one.judged(domain) for one in answered]
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
        measured=measured(domain, judged),
        details=_details(domain, judged),
        outcomes=_outcomes(domain, answered),
        unparsed=sum(not verdict.parsed for verdict in verdicts),
        truncated=sum(one.finish_reason == "length" for one in answered),
        results=results,
        failures=tuple(_failure(one, domain) for one in answered if not one.verdict.passed),
        samples=tuple(
            _sample(one.case, one.outputs[0], one.verdict.passed) for one in answered if one.case.case_id in shown
        ),
    )


def _details(domain: Domain, judged: Sequence[Judged]) -> dict[str, Any]:
    with domain_code(domain, "report"):
        details = dict(domain.report(judged))
        to_json(details)  # raises for what JSON cannot hold
        return details


def _sampled(cases: Sequence[Case]) -> list[Case]:
    """The same few of any selection of the cases: of every kind in turn, in an order that no file's order decides."""
    kinds: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: hashlib.sha256(case.case_id.encode()).hexdigest()):
        kinds.setdefault(case.kind, []).append(case)
    turns = zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [case for turn in turns for case in turn if case is not None][:SAMPLES]


def _sample(case: Case, output: str, passed: bool | None) -> CaseSample:
    return CaseSample(
        case_id=case.case_id,
        kind=case.kind,
        prompt=case.prompt,
        output=output,
        passed=passed,
        expected=case.expected,
    )


def _outcomes(domain: Domain, answered: Sequence[_Answered]) -> dict[str, dict[str, int]]:
    """Nothing where the domain names no outcomes, has no gold answers, or has too many outcomes for a matrix."""
    if not (domain.has("outcome") and domain.has("gold")):
        return {}
    counts: dict[str, Counter[str]] = {}
    for one in answered:
        about = f"case {one.case.case_id}"
        with domain_code(domain, "gold", about):
            gold = domain.verify(domain.gold(one.case.facts), one.case.facts)
        with domain_code(domain, "outcome", about):
            right, found = (
                domain.outcome(verdict.output) if verdict.parsed else NO_OUTCOME for verdict in (gold, one.verdict)
            )
        counts.setdefault(right, Counter())[found] += 1
    named = sorted({*counts, *(found for row in counts.values() for found in row)} - {NO_OUTCOME})
    if len(named) > MOST_OUTCOMES:
        return {}
    answers = [*named, NO_OUTCOME]
    return {right: {found: counts[right][found] for found in answers} for right in named if right in counts}


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
        prompt=case.prompt,
        output=one.outputs[0],
        finish_reason=one.finish_reason,
        failed=verdict.failed,
        reasons=tuple(verdict.reasons.values()),
        expected=case.expected,
        owner=owner.name,
        next_action=owner.next_action,
    )
