"""Run policy cases through the engine that ships, judge every answer, keep every failure with its owner."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from twinloop.common.errors import UserError
from twinloop.domains.domain import Verdict
from twinloop.evaluation.claims import claims_action
from twinloop.evaluation.metrics import Rate
from twinloop.evaluation.router import Failure, route
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import SamplingParams

FactsT = TypeVar("FactsT")

BATCH = 128
"""Prompts handed to the engine at once: enough to keep its slots busy, few enough to show progress."""


class Completion(Protocol):
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str: ...


class Generator(Protocol):
    """The part of serving.engine.Engine that this needs."""

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> Sequence[Completion]: ...


@dataclass(frozen=True)
class Case(Generic[FactsT]):
    """One prompt, and the trusted facts by which its answer is judged. Both sides of a flip share a `pair_id`."""

    case_id: str
    kind: str
    prompt: tuple[dict[str, str], ...]
    facts: FactsT
    pair_id: str | None
    expected: dict[str, Any]
    digest: str
    """Sha256 of the record."""


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
    claims_action: bool
    expected: dict[str, Any]
    owner: str
    next_action: str


class CaseReport(_Record):
    """What the cases showed. A flip pair passes when both its sides do; an unparsed answer fails every predicate."""

    cases_digest: str
    """Equal for two reports on the same cases: only then are they comparable case by case."""
    overall: Rate
    by_kind: dict[str, Rate]
    by_predicate: dict[str, Rate]
    flip_pairs: Rate
    side_effect_claims: int
    unparsed: int
    truncated: int
    """Answers that ran into max_tokens."""
    results: tuple[CaseResult, ...]
    failures: tuple[CaseFailure, ...]

    def kind(self, kind: str) -> Rate | None:
        """The pass rate of one kind, None when no case is of it."""
        return self.by_kind.get(kind)

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a tracker."""
        rates = {"pass_rate": self.overall, "flip_pairs": self.flip_pairs}
        rates |= {f"kind/{kind}": rate for kind, rate in self.by_kind.items()}
        rates |= {f"predicate/{name}": rate for name, rate in self.by_predicate.items()}
        numbers = {name: rate.rate for name, rate in rates.items() if rate.total}
        numbers |= {f"{name}_low": rate.interval[0] for name, rate in rates.items() if rate.total}
        return numbers | {
            "cases": self.overall.total,
            "side_effect_claims": self.side_effect_claims,
            "unparsed": self.unparsed,
            "truncated": self.truncated,
        }


class Comparison(_Record):
    """Two models on the same cases: how many only the champion passes (lost), how many only the candidate (won)."""

    champion: str
    lost: int
    won: int
    total: int


def read_cases(
    records: Iterable[Mapping[str, Any]], read_facts: Callable[[Mapping[str, Any]], FactsT]
) -> list[Case[FactsT]]:
    """Cases from their records; `read_facts` is the domain's (domains.returns.verifier.Facts.from_record).

    Raises UserError for two cases of one id, and for a flip pair that has not exactly two sides.
    """
    cases = [
        Case(
            case_id=record["case_id"],
            kind=record["kind"],
            prompt=tuple(dict(message) for message in record["prompt"]),
            facts=read_facts(record["facts"]),
            pair_id=record.get("pair_id"),
            expected=dict(record["expected"]),
            digest=hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest(),
        )
        for record in records
    ]
    ids = Counter(case.case_id for case in cases)
    if repeated := [case_id for case_id, count in ids.items() if count > 1]:
        raise UserError(f"cases: case_id {repeated[0]} stands {ids[repeated[0]]} times; give every case its own")
    sides = Counter(case.pair_id for case in cases if case.pair_id is not None)
    if broken := [pair_id for pair_id, count in sides.items() if count != 2]:
        raise UserError(f"cases: pair {broken[0]} has {sides[broken[0]]} sides; a flip pair needs exactly two")
    return cases


def run_cases(
    engine: Generator,
    tokenizer: ChatTokenizer,
    cases: Sequence[Case[FactsT]],
    verify: Callable[[str, FactsT], Verdict],
    *,
    max_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> CaseReport:
    """Answer every case greedily and judge the answers. `on_progress` is told (done, total) after each batch.

    Raises UserError when there are no cases.
    """
    if not cases:
        raise UserError("cases: there are none to run; nothing can be said about a model without them")
    greedy = SamplingParams(max_tokens=max_tokens, stop=(tokenizer.stop_id,))
    judged: list[tuple[Case[FactsT], str, str, Verdict]] = []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        prompts = [tokenizer.encode_prompt(case.prompt) for case in batch]
        completions = engine.generate(prompts, greedy)
        for case, completion in zip(batch, completions, strict=True):
            output = tokenizer.decode(completion.tokens)
            judged.append((case, output, completion.finish_reason, verify(output, case.facts)))
        if on_progress:
            on_progress(len(judged), len(cases))
    return _report(judged)


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


def _report(judged: Sequence[tuple[Case[FactsT], str, str, Verdict]]) -> CaseReport:
    results = tuple(
        CaseResult(case_id=case.case_id, kind=case.kind, pair_id=case.pair_id, passed=verdict.passed)
        for case, _, _, verdict in judged
    )
    verdicts = [verdict for *_, verdict in judged]
    pairs: dict[str, bool] = {}
    for result in results:
        if result.pair_id is not None:
            pairs[result.pair_id] = pairs.get(result.pair_id, True) and result.passed
    claims = sum(_claims_action(output, verdict) for _, output, _, verdict in judged)
    digests = sorted(case.digest for case, *_ in judged)
    return CaseReport(
        cases_digest=hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        overall=Rate.of([result.passed for result in results]),
        by_kind={
            kind: Rate.of([result.passed for result in results if result.kind == kind])
            for kind in sorted({result.kind for result in results})
        },
        by_predicate={name: Rate.of([verdict.checks[name] for verdict in verdicts]) for name in verdicts[0].checks},
        flip_pairs=Rate.of(list(pairs.values())),
        side_effect_claims=claims,
        unparsed=sum(not verdict.parsed for verdict in verdicts),
        truncated=sum(finish_reason == "length" for _, _, finish_reason, _ in judged),
        results=results,
        failures=tuple(_failure(*one) for one in judged if not one[-1].passed),
    )


def _failure(case: Case[FactsT], output: str, finish_reason: str, verdict: Verdict) -> CaseFailure:
    failed = verdict.failed
    claims = _claims_action(output, verdict)
    owner = route(
        Failure(
            failed_predicates=frozenset(failed),
            claims_action=claims,
            missing_fields=tuple(name for name, value in (verdict.output or {}).items() if value == ""),
            release_regression=case.kind == "golden",
        )
    )
    return CaseFailure(
        case_id=case.case_id,
        kind=case.kind,
        pair_id=case.pair_id,
        output=output,
        finish_reason=finish_reason,
        failed=failed,
        reasons=tuple(verdict.reasons.values()),
        claims_action=claims,
        expected=case.expected,
        owner=owner.owner,
        next_action=owner.next_action,
    )


def _claims_action(output: str, verdict: Verdict) -> bool:
    """Whether an answer claims what no tool did, also one that is not a decision and so was never judged for it."""
    if verdict.passed:
        return False
    return (verdict.parsed and not verdict.checks.get("no_side_effect", True)) or claims_action(output)
