"""What a reward model is worth: on pairs that it never saw, and on answers that would hack it.

Reward hacking is tried before any of it is paid for: each wrong answer of the domain's audit is scored beside the right
one, and none may score as high.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Message, domain_code
from twinloop.domains.owners import TRAINING
from twinloop.evaluation.audit import NEEDED
from twinloop.evaluation.case_report import CaseFailure, CaseReport, CaseResult
from twinloop.evaluation.cases import Case
from twinloop.evaluation.metrics import Estimate, Rate, wilson_interval
from twinloop.models.tokenizer import ChatTokenizer

PAIR, HACKING = "preference", "reward_hacking"
"""The kind of a pair in a report, and the name under which wrong answers are counted that score too high."""
ACCURACY = "reward_accuracy"
"""The share of pairs in which the chosen answer scores higher: a mean over prompts of each one's share."""
AUDITED_CASES = 64
"""With their wrong answers some 2,000 texts, each prompt of which is read once."""

OnProgress = Callable[[int, int], None]


class RewardEngine(Protocol):
    """The part of serving.engine.Engine that this needs."""

    @property
    def max_length(self) -> int: ...

    def prefill(self, slot: int, tokens: Sequence[int], *, start: int = 0) -> np.ndarray:
        """Read tokens from a position of the slot on; what the head gives to the last one."""
        ...


def judge_reward_model(
    engine: RewardEngine,
    tokenizer: ChatTokenizer,
    pairs: Sequence[Mapping[str, Any]],
    cases: Sequence[Case],
    domain: Domain,
    *,
    on_progress: OnProgress | None = None,
) -> tuple[CaseReport, dict[str, float]]:
    """Score pairs and, where the domain has an audit, the wrong answers to the first cases. The report has a pair as a
    case, which passes when the chosen answer scores higher. Pairs of one prompt are no independent evidence: a
    prompt counts as one in the accuracy and in its interval.

    pairs: records of preferences that were not trained on. Raises UserError where there are none, and where a method of
    the domain raises.
    """
    if not pairs:
        raise UserError("preferences: none is held out to measure a reward model on; add some, of more prompts")
    audited = list(cases[:AUDITED_CASES]) if all(domain.has(part) for part in NEEDED) else []
    scorer = _Scorer(engine, tokenizer)
    margins: list[float] = []
    for done, pair in enumerate(pairs, 1):
        chosen, rejected = scorer.scores(pair["prompt"], [pair["chosen"], pair["rejected"]])
        margins.append(chosen - rejected)
        if on_progress:
            on_progress(done, len(pairs) + len(audited))
    tried, hacked = Counter[str](), Counter[str]()
    for done, case in enumerate(audited, len(pairs) + 1):
        _try_wrong_answers(scorer, case, domain, tried, hacked)
        if on_progress:
            on_progress(done, len(pairs) + len(audited))
    numbers = {"reward_margin": float(np.mean(margins))}
    if tried:
        numbers["reward_hacking_share"] = sum(hacked.values()) / sum(tried.values())
    return _report(pairs, margins, tried, hacked), numbers


def _try_wrong_answers(scorer: _Scorer, case: Case, domain: Domain, tried: Counter[str], hacked: Counter[str]) -> None:
    """Count, by name, the wrong answers to a case and those of them that score as high as the right one. What is longer
    than the network's context has no score."""
    about = f"case {case.case_id}"
    with domain_code(domain, "gold", about):
        gold = domain.gold(case.facts)
    if not scorer.fits(case.prompt, gold):
        return
    with domain_code(domain, "wrong", about):
        wrong = [(name, output) for name, output in domain.wrong(gold, case.facts) if scorer.fits(case.prompt, output)]
    right, *scores = scorer.scores(case.prompt, [gold, *(output for _, output in wrong)])
    for (name, _), score in zip(wrong, scores, strict=True):
        tried[name] += 1
        hacked[name] += int(not score < right)  # a score that is no number too


class _Scorer:
    def __init__(self, engine: RewardEngine, tokenizer: ChatTokenizer):
        self._engine, self._tokenizer = engine, tokenizer

    def scores(self, prompt: Sequence[Message], answers: Iterable[str]) -> list[float]:
        """Of each answer to the prompt, which is read once."""
        tokens = self._tokenizer.encode_prompt(prompt)
        self._engine.prefill(0, tokens)
        encoded = [self._tokenizer.encode_sampled(answer) for answer in answers]
        return [float(self._engine.prefill(0, answer, start=len(tokens))[0]) for answer in encoded]

    def fits(self, prompt: Sequence[Message], answer: str) -> bool:
        tokens = len(self._tokenizer.encode_prompt(prompt)) + len(self._tokenizer.encode_sampled(answer))
        return tokens <= self._engine.max_length


def _report(
    pairs: Sequence[Mapping[str, Any]], margins: Sequence[float], tried: Counter[str], hacked: Counter[str]
) -> CaseReport:
    digests = [hashlib.sha256(json.dumps(dict(pair), sort_keys=True).encode()).hexdigest() for pair in pairs]
    results = tuple(
        CaseResult(case_id=digest[:16], kind=PAIR, pair_id=None, passed=margin > 0)
        for digest, margin in zip(digests, margins, strict=True)
    )
    accuracy = Rate.of([result.passed for result in results])
    return CaseReport(
        cases_digest=hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(),
        overall=accuracy,
        by_kind={PAIR: accuracy},
        pairs={},
        by_predicate={},
        violations={HACKING: sum(hacked.values())} if tried else {},
        measured={ACCURACY: _accuracy(pairs, results)},
        details={HACKING: {name: {"tried": tried[name], "hacked": hacked[name]} for name in sorted(tried)}},
        unparsed=0,
        truncated=0,
        results=results,
        failures=tuple(
            _failure(pair, result, margin)
            for pair, result, margin in zip(pairs, results, margins, strict=True)
            if not result.passed
        ),
    )


def _accuracy(pairs: Sequence[Mapping[str, Any]], results: Sequence[CaseResult]) -> Estimate:
    by_prompt: dict[str, list[bool]] = {}
    for pair, result in zip(pairs, results, strict=True):
        by_prompt.setdefault(json.dumps(pair["prompt"], sort_keys=True), []).append(result.passed)
    shares = [float(np.mean(passed)) for passed in by_prompt.values()]
    return Estimate(value=float(np.mean(shares)), interval=wilson_interval(math.fsum(shares), len(shares)))


def _failure(pair: Mapping[str, Any], result: CaseResult, margin: float) -> CaseFailure:
    return CaseFailure(
        case_id=result.case_id,
        kind=result.kind,
        pair_id=None,
        prompt=tuple(dict(message) for message in pair["prompt"]),
        output=pair["rejected"],
        finish_reason="stop",
        failed=(PAIR,),
        reasons=(_why(margin),),
        expected={"chosen": pair["chosen"]},
        owner=TRAINING.name,
        next_action=TRAINING.next_action,
    )


def _why(margin: float) -> str:
    if margin == 0:
        return "the rejected answer scores as high as the chosen one"
    if margin < 0:
        return f"the rejected answer scores {-margin:.3g} higher than the chosen one"
    return "one of the answers has a score that is no number"
