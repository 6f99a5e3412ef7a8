"""The numbers that domains report of all cases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

LabelT = TypeVar("LabelT", bound=Hashable)


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


def accuracy(matrix: Mapping[LabelT, Mapping[LabelT | None, int]]) -> float:
    """Share of right labels in a confusion matrix. Raises ValueError for an empty one."""
    total = sum(sum(row.values()) for row in matrix.values())
    if not total:
        raise ValueError("accuracy of no labels")
    return sum(row.get(label, 0) for label, row in matrix.items()) / total


def macro_f1(matrix: Mapping[LabelT, Mapping[LabelT | None, int]]) -> float:
    """Mean over the labels that occur of F1, 2 TP / (2 TP + FP + FN). Raises ValueError for an empty matrix."""
    if not matrix:
        raise ValueError("F1 of no labels")
    scores = []
    for label, row in matrix.items():
        answered = sum(other.get(label, 0) for other in matrix.values())
        scores.append(2 * row.get(label, 0) / (sum(row.values()) + answered))
    return math.fsum(scores) / len(scores)
