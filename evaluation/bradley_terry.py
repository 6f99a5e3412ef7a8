"""How good things are from judgements of pairs: Bradley and Terry (1952), with Davidson's ties (1970).

Item i has a strength s_i. Of a judgement of i and j, with a = exp(s_i), b = exp(s_j),

    P(i) : P(j) : P(tie) = a : b : nu * sqrt(a * b)

where nu says how readily ties are given; without any tie it is 0. Each strength has a normal prior around 0, and so
has log nu: strengths exist also where one item was preferred every time. The log-likelihood is that of a multinomial
logit, which is concave, so Newton's method finds its only maximum; intervals are from the curvature there (Laplace).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from twinloop.evaluation.metrics import Z_95

PRIOR_SD = 3.0
"""Of a strength, as log-odds against the average item: 95% of the prior lies within odds of 1 to 360."""
MOST_MORE = 1_000_000
_STEPS = 100
_PRECISE = 1e-10


@dataclass(frozen=True)
class Ratings:
    """strengths [K]: log-odds, mean 0. covariance [K, K]. log_nu: None where there was no tie."""

    strengths: np.ndarray
    covariance: np.ndarray
    log_nu: float | None
    counts: np.ndarray
    """[K, K], symmetric: judgements of each pair."""
    prior_sd: float

    def interval(self, item: int) -> tuple[float, float]:
        """95%, of a strength against the mean of all."""
        contrast = -np.full(len(self.strengths), 1 / len(self.strengths))
        contrast[item] += 1
        margin = Z_95 * math.sqrt(contrast @ self.covariance @ contrast)
        return float(self.strengths[item]) - margin, float(self.strengths[item]) + margin

    def difference(self, better: int, worse: int) -> tuple[float, float]:
        """(s_better - s_worse, its standard error)."""
        return _difference(self.strengths, self.covariance, better, worse)

    def certainty(self, better: int, worse: int) -> float:
        """The probability that one is stronger than the other."""
        difference, error = self.difference(better, worse)
        return _normal(difference / error)

    @property
    def order(self) -> list[int]:
        """Items, strongest first."""
        return sorted(range(len(self.strengths)), key=lambda item: (-self.strengths[item], item))

    def order_is_certain(self, level: float = 0.95) -> bool:
        """Whether the whole order is right with this probability, by Bonferroni's bound over neighbours."""
        return self._certain(self.covariance, level)

    def judgements_needed(self, asked: np.ndarray, level: float = 0.95) -> int | None:
        """How many more judgements make the order certain, if they come out as those so far; None: over a million.

        asked [K, K], symmetric: those of the judgements so far that more would be like.
        """
        if self.order_is_certain(level):
            return 0
        total = np.triu(asked).sum()
        if not total:
            return None
        place = self.strengths if self.log_nu is None else np.append(self.strengths, self.log_nu)
        now = _curvature(place, self.counts) + np.eye(len(place)) / self.prior_sd**2
        each = _curvature(place, asked / total)

        def enough(more: int) -> bool:
            return self._certain(_strengths_part(np.linalg.inv(now + more * each), len(self.strengths)), level)

        if not enough(MOST_MORE):
            return None
        low, high = 0, MOST_MORE
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    def _certain(self, covariance: np.ndarray, level: float) -> bool:
        allowed = (1 - level) / (len(self.strengths) - 1)
        order = self.order
        for better, worse in itertools.pairwise(order):
            difference, error = _difference(self.strengths, covariance, better, worse)
            if _normal(difference / error) < 1 - allowed:
                return False
        return True


def rate(preferred: np.ndarray, ties: np.ndarray, prior_sd: float = PRIOR_SD) -> Ratings:
    """The ratings of K >= 2 items.

    preferred [K, K]: row i, column j: how often i was preferred to j. ties [K, K], symmetric: ties of each pair.
    """
    count = len(preferred)
    has_ties = bool(ties.any())
    place = np.zeros(count + has_ties)
    prior = np.eye(len(place)) / prior_sd**2
    counts = preferred + preferred.T + ties

    def objective(at: np.ndarray) -> float:
        return _log_likelihood(at, preferred, ties) - at @ prior @ at / 2

    value = objective(place)
    for _ in range(_STEPS):
        gradient = _gradient(place, preferred, ties) - prior @ place
        step = np.linalg.solve(_curvature(place, counts) + prior, gradient)
        while (found := objective(place + step)) < value - _PRECISE:
            step /= 2
        place, value = place + step, found
        if np.abs(step).max() < _PRECISE:
            break
    covariance = _strengths_part(np.linalg.inv(_curvature(place, counts) + prior), count)
    strengths = place[:count] - place[:count].mean()
    return Ratings(strengths, covariance, float(place[count]) if has_ties else None, counts, prior_sd)


def _outcomes(size: int, count: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(i, j, features [2 or 3, size]) of each pair: preferring i, preferring j, and a tie where there are any."""
    for i in range(count):
        for j in range(i + 1, count):
            features = np.zeros((2 + size - count, size))
            features[0, i] = features[1, j] = 1
            if size > count:
                features[2, [i, j]] = 0.5
                features[2, count] = 1
            yield i, j, features


def _chances(features: np.ndarray, place: np.ndarray) -> np.ndarray:
    utilities = features @ place
    utilities -= utilities.max()
    odds = np.exp(utilities)
    chances: np.ndarray = odds / odds.sum()
    return chances


def _seen(i: int, j: int, preferred: np.ndarray, ties: np.ndarray, kinds: int) -> np.ndarray:
    return np.array([preferred[i, j], preferred[j, i], ties[i, j]][:kinds], np.float64)


def _log_likelihood(place: np.ndarray, preferred: np.ndarray, ties: np.ndarray) -> float:
    pairs = _outcomes(len(place), len(preferred))
    return sum(float(_seen(i, j, preferred, ties, len(f)) @ np.log(_chances(f, place))) for i, j, f in pairs)


def _gradient(place: np.ndarray, preferred: np.ndarray, ties: np.ndarray) -> np.ndarray:
    total = np.zeros(len(place))
    for i, j, features in _outcomes(len(place), len(preferred)):
        seen = _seen(i, j, preferred, ties, len(features))
        total += (seen - seen.sum() * _chances(features, place)) @ features
    return total


def _curvature(place: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Minus the second derivatives of the log-likelihood: what so many judgements of each pair tell."""
    total = np.zeros((len(place), len(place)))
    for i, j, features in _outcomes(len(place), len(counts)):
        chances = _chances(features, place)
        mean = chances @ features
        total += counts[i, j] * ((features.T * chances) @ features - np.outer(mean, mean))
    return total


def _strengths_part(covariance: np.ndarray, count: int) -> np.ndarray:
    return covariance[:count, :count]


def _difference(strengths: np.ndarray, covariance: np.ndarray, one: int, other: int) -> tuple[float, float]:
    variance = covariance[one, one] + covariance[other, other] - 2 * covariance[one, other]
    return float(strengths[one] - strengths[other]), math.sqrt(variance)


def _normal(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2
