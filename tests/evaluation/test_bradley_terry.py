"""Strengths from judgements of pairs: the closed forms of two items, a second algorithm, and what intervals promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twinloop.evaluation.bradley_terry import PRIOR_SD, Ratings, rate

FLAT = 1e4
"""A prior that says nothing."""


def two(wins: float, losses: float, ties: float = 0, prior_sd: float = FLAT) -> Ratings:
    return rate(np.array([[0, wins], [losses, 0.0]]), np.array([[0, ties], [ties, 0.0]]), prior_sd)


def test_of_two_items_the_difference_is_the_log_odds_and_its_error_that_of_a_logit() -> None:
    ratings = two(30, 10)
    assert ratings.difference(0, 1) == pytest.approx((math.log(3), math.sqrt(1 / 30 + 1 / 10)), rel=1e-5)
    low, high = ratings.interval(0)
    assert (low + high) / 2 == pytest.approx(math.log(3) / 2, rel=1e-5)
    assert high - low == pytest.approx(1.959964 * math.sqrt(1 / 30 + 1 / 10), rel=1e-5)


def test_with_ties_two_items_have_the_shares_that_were_seen() -> None:
    ratings = two(30, 12, 18)
    assert ratings.difference(0, 1)[0] == pytest.approx(math.log(30 / 12), rel=1e-5)
    assert ratings.log_nu == pytest.approx(math.log(18 / math.sqrt(30 * 12)), rel=1e-5)


def test_of_two_items_ties_say_nothing_about_which_is_better() -> None:
    assert two(8, 5, 90).difference(0, 1) == pytest.approx(two(8, 5).difference(0, 1), rel=1e-5)


def test_the_prior_balances_the_score_equation() -> None:
    wins, losses = 7, 0
    ratings = two(wins, losses, prior_sd=PRIOR_SD)
    difference, error = ratings.difference(0, 1)
    chance = 1 / (1 + math.exp(-difference))
    assert wins - (wins + losses) * chance == pytest.approx(difference / (2 * PRIOR_SD**2), rel=1e-6)
    information = (wins + losses) * chance * (1 - chance) + 1 / (2 * PRIOR_SD**2)
    assert error == pytest.approx(1 / math.sqrt(information), rel=1e-6)
    assert two(70, 0, prior_sd=PRIOR_SD).difference(0, 1)[0] > difference


def test_without_judgements_all_are_equal_and_nothing_is_certain() -> None:
    ratings = rate(np.zeros((3, 3)), np.zeros((3, 3)))
    assert ratings.strengths == pytest.approx(0)
    assert not ratings.order_is_certain()
    assert ratings.judgements_needed(np.zeros((3, 3))) is None
    assert ratings.certainty(0, 1) == 0.5


def minorise_maximise(preferred: np.ndarray) -> np.ndarray:
    """Hunter (2004): the maximum of the likelihood by another algorithm, as log-odds with mean 0."""
    counts, odds = preferred + preferred.T, np.ones(len(preferred))
    for _ in range(5000):
        odds = preferred.sum(1) / (counts / (odds[:, None] + odds[None, :])).sum(1)
        odds /= np.exp(np.log(odds).mean())
    return np.log(odds)


def test_several_items_have_the_strengths_that_the_mm_algorithm_finds() -> None:
    preferred = np.array([[0, 12, 20, 9], [8, 0, 14, 3], [5, 6, 0, 7], [11, 2, 13, 0.0]])
    ratings = rate(preferred, np.zeros((4, 4)), FLAT)
    assert ratings.strengths == pytest.approx(minorise_maximise(preferred), abs=1e-5)
    assert ratings.order == sorted(range(4), key=lambda item: -ratings.strengths[item])
    relabelled = rate(preferred[::-1, ::-1], np.zeros((4, 4)), FLAT)
    assert relabelled.strengths == pytest.approx(ratings.strengths[::-1])


def drawn(rng: np.random.Generator, strengths: np.ndarray, each: int, log_nu: float) -> tuple[np.ndarray, np.ndarray]:
    preferred, ties = np.zeros((len(strengths),) * 2), np.zeros((len(strengths),) * 2)
    for i in range(len(strengths)):
        for j in range(i):
            utilities = np.array([strengths[i], strengths[j], log_nu + (strengths[i] + strengths[j]) / 2])
            chances = np.exp(utilities) / np.exp(utilities).sum()
            preferred[i, j], preferred[j, i], ties[i, j] = rng.multinomial(each, chances)
            ties[j, i] = ties[i, j]
    return preferred, ties


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng, truth = np.random.default_rng(3), np.array([0.8, 0.1, -0.9])
    held = []
    for _ in range(150):
        ratings = rate(*drawn(rng, truth, 40, log_nu=-0.5))
        held += [low <= truth[item] <= high for item in range(3) for low, high in [ratings.interval(item)]]
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.parametrize(("wins", "losses"), [(12, 10), (60, 48), (6, 4)])
def test_judgements_that_are_needed_follow_from_the_square_of_the_standard_error(wins: int, losses: int) -> None:
    ratings = two(wins, losses)
    asked = np.array([[0, wins + losses], [wins + losses, 0.0]])
    share = wins / (wins + losses)
    enough = (1.6448536 / math.log(wins / losses)) ** 2 / (share * (1 - share))
    assert ratings.judgements_needed(asked) == pytest.approx(math.ceil(enough - (wins + losses)), abs=1)


def test_an_order_that_is_certain_needs_no_more_and_equals_need_more_than_can_be_told() -> None:
    asked = np.array([[0, 40], [40, 0.0]])
    assert two(32, 8).order_is_certain()
    assert two(32, 8).judgements_needed(asked) == 0
    assert two(20, 20).judgements_needed(asked) is None
    assert two(32, 8).certainty(0, 1) > 0.999
    assert two(32, 8).certainty(1, 0) < 0.001
