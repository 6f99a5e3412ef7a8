"""The numbers that domains report of all cases: ready-made metrics, and the arithmetic of one's own.

metrics = {"bleu": bleu(), "pass_at_1": pass_at(1), "pass_at_8": pass_at(8)}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from twinloop.domains.domain import Judged, Metric, Statistic

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as Sacre

LabelT = TypeVar("LabelT", bound=Hashable)

CALIBRATION_BINS = 15
"""As in Guo et al., 2017."""


# --- ready-made metrics


def mean(of_case: Callable[[Judged], float | None]) -> Statistic:
    """The mean of a value from 0 to 1 a case; None: the case does not count."""

    def terms(case: Judged) -> Mapping[Any, float] | None:
        value = of_case(case)
        if value is None:
            return None
        return {"sum": _from_0_to_1(value), "cases": 1}

    return Statistic(terms, lambda sums: sums["sum"] / sums["cases"], mean=True)


def exact_match() -> Metric:
    """Share of cases whose greedy answer is the reference answer; white space around it does not matter."""

    def matches(case: Judged) -> float | None:
        return None if case.reference is None else float(case.greedy.strip() == case.reference.strip())

    return Metric("exact match", share=True, of=mean(matches))


def pass_at(k: int) -> Metric:
    """pass@k, of cases that were sampled k times or more (`evaluate.samples`); several k share their samples."""

    def passed(case: Judged) -> float | None:
        count = len(case.verdicts)
        return pass_at_k(count, sum(verdict.passed for verdict in case.verdicts), k) if count >= k else None

    return Metric(f"pass@{k}, of sampled answers", share=True, of=mean(passed))


def bleu(tokenize: str = "13a") -> Metric:
    """Corpus BLEU, 0 to 100, of greedy answers against the reference answers (Papineni et al., 2002; Post, 2018).

    tokenize: sacrebleu's name of a tokenizer, such as `zh`, `char` or `flores200`.
    """

    def make() -> Sacre:
        from sacrebleu.metrics import BLEU

        return BLEU(tokenize=tokenize)

    return Metric(f"BLEU ({tokenize})", of=_of_sacrebleu(make))


def chrf(word_order: int = 0) -> Metric:
    """Corpus chrF, 0 to 100, of greedy answers against the reference answers (Popović, 2015).

    word_order: 2 makes it chrF++.
    """

    def make() -> Sacre:
        from sacrebleu.metrics import CHRF

        return CHRF(word_order=word_order)

    return Metric(f"chrF{'+' * word_order}", of=_of_sacrebleu(make))


def calibration_error(confidence: Callable[[Any], float | None] | None = None) -> Metric:
    """Expected calibration error of greedy answers, 0 to 1: the mean distance, over bins of equal width, between the
    mean confidence and the share of passed answers, weighted by answers (Guo et al., 2017).

    confidence: what an answer says of its own certainty, from its parsed output; None: the case does not count. By
    default it is the probability that the model gives to the whole answer.
    """

    def terms(case: Judged) -> Mapping[Any, float] | None:
        sure = confidence(case.greedy_verdict.output) if confidence else case.confidence
        if sure is None:
            return None
        gap = _from_0_to_1(sure) - case.greedy_verdict.passed
        return {min(int(sure * CALIBRATION_BINS), CALIBRATION_BINS - 1): gap, "answers": 1}

    def value(sums: Mapping[Any, float]) -> float:
        return math.fsum(abs(gap) for place, gap in sums.items() if place != "answers") / sums["answers"]

    return Metric("calibration error", "at most", share=True, of=Statistic(terms, value))


def macro_f1_of(pairs: Callable[[Judged], Sequence[tuple[str, str | None]]]) -> Statistic:
    """Macro F1, from the (right label, answered one) of a case's answers."""

    def value(sums: Mapping[Any, float]) -> float:
        rows: dict[str, dict[str | None, float]] = {}
        for (right, said), count in sums.items():
            if count:
                rows.setdefault(right, {})[said] = count
        return macro_f1(rows)

    return Statistic(lambda case: Counter(pairs(case)), value)


def _from_0_to_1(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a number from 0 to 1")
    return float(value)


def _of_sacrebleu(make: Callable[[], Sacre]) -> Statistic:
    """The statistics of sentences that sacrebleu's own bootstrap adds up, which have no public name (2.6.0)."""
    tool = cache(make)  # sacrebleu is imported when the first answer is compared

    def terms(case: Judged) -> Mapping[Any, float] | None:
        if case.reference is None:
            return None
        [found] = tool()._extract_corpus_statistics([case.greedy], [[case.reference]])
        return dict(enumerate(found))

    def value(sums: Mapping[Any, float]) -> float:
        return float(tool()._compute_score_from_stats([round(each) for each in sums.values()]).score)

    return Statistic(terms, value, range=(0, 100))


# --- their arithmetic


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that at least one of k sampled answers passes, estimated without bias from `samples` of them.

    1 - C(samples - passed, k) / C(samples, k) (Chen et al., 2021). Raises ValueError for fewer samples than k.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {passed} passed answers among {samples}")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def confusion_matrix(pairs: Sequence[tuple[LabelT, LabelT | None]]) -> dict[LabelT, dict[LabelT | None, int]]:
    """From (right label, answered one), how often each label was answered, by the right one. None: no label at all."""
    rows: dict[LabelT, Counter[LabelT | None]] = {}
    for right, answered in pairs:
        rows.setdefault(right, Counter())[answered] += 1
    return {right: dict(row) for right, row in rows.items()}


def accuracy(matrix: Mapping[LabelT, Mapping[LabelT | None, float]]) -> float:
    """Share of right labels in a confusion matrix. Raises ValueError for an empty one."""
    total = sum(sum(row.values()) for row in matrix.values())
    if not total:
        raise ValueError("accuracy of no labels")
    return sum(row.get(label, 0) for label, row in matrix.items()) / total


def macro_f1(matrix: Mapping[LabelT, Mapping[LabelT | None, float]]) -> float:
    """Mean over the labels that occur of F1, 2 TP / (2 TP + FP + FN). Raises ValueError for an empty matrix."""
    if not matrix:
        raise ValueError("F1 of no labels")
    scores = []
    for label, row in matrix.items():
        answered = sum(other.get(label, 0) for other in matrix.values())
        scores.append(2 * row.get(label, 0) / (sum(row.values()) + answered))
    return math.fsum(scores) / len(scores)
