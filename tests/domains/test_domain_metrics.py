"""The numbers that domains report of all cases."""

from __future__ import annotations

import itertools

import pytest

from twinloop.domains.metrics import accuracy, confusion_matrix, macro_f1, pass_at_k


def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers() -> None:
    answers = [True, False, False, True, False]
    for k in range(1, 6):
        chosen = [any(some) for some in itertools.combinations(answers, k)]
        assert pass_at_k(5, 2, k) == pytest.approx(sum(chosen) / len(chosen))
    assert pass_at_k(5, 0, 5) == 0.0
    with pytest.raises(ValueError, match="pass@6"):
        pass_at_k(5, 2, 6)


def test_accuracy_and_f1_of_a_confusion_matrix() -> None:
    # precision and recall: a 2/3 and 2/4, b 1/3 and 1/1, c never answered
    pairs = [*[("a", "a")] * 2, *[("a", "b")] * 2, ("b", "b"), ("c", "a"), ("c", None)]
    matrix = confusion_matrix(pairs)
    assert matrix == {"a": {"a": 2, "b": 2}, "b": {"b": 1}, "c": {"a": 1, None: 1}}
    assert accuracy(matrix) == pytest.approx(3 / 7)
    assert macro_f1(matrix) == pytest.approx((2 * 2 / (4 + 3) + 2 * 1 / (1 + 3) + 0) / 3)
    with pytest.raises(ValueError, match="no labels"):
        accuracy({})
