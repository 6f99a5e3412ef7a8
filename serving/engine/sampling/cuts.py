"""Which tokens are left to the draw: the likeliest ones, as `top_k`, `top_p` and `min_p` say.

A whole vocabulary is hardly ever sorted. Some hundred candidates are: every token that is at least as likely as the
256th of the likeliest tokens of 768 groups, so that no other token is before any of them. Where they do not hold all
that is left, a sample says where about the last token that is left must be, and only what is near it is sorted. The
result is that of the full sort.

Shapes: letters as in `models.shapes`; N candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from twinloop.serving.engine.sampling.bounds import bounded

_CANDIDATES = 256
_GROUPS_PER_CANDIDATE = 3
"""More groups are slower to sort, fewer leave more candidates: with 3 there are about 1.2 times as many as wanted."""

_SAMPLE, _SAMPLE_ERROR = 2048, 96
"""How many values are looked at, and by how many of them the place of a token among them may be wrong: about four
standard deviations."""

_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """They act in this order on the distribution after the temperature: min_p keeps the tokens that have at least that
    share of the likeliest one's probability; top_k keeps so many of them (0 or -1: all); top_p the smallest set of what
    is then left that holds that share of it. Of tokens that are equally likely those with lower ids go first."""

    min_p: float = bounded(0.0, lambda share: 0 <= share <= 1, "between 0 and 1")
    top_k: int = bounded(0, lambda count: count >= -1, "at least 1, or 0 or -1 for the whole vocabulary")
    top_p: float = bounded(1.0, lambda share: 0 < share <= 1, "above 0 and at most 1")

    @property
    def cutting(self) -> bool:
        """Whether anything is cut."""
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1

    def kept(self, shifted_V: np.ndarray) -> np.ndarray:
        """The ids of the tokens left, int64, ascending. shifted_V: logits after the temperature, the largest one 0."""
        weight_V = np.exp(shifted_V) if self.top_p < 1 and self.top_k <= 0 and self.min_p == 0 else None
        few_N = self._of_candidates(shifted_V, weight_V)
        if few_N is not None:
            return few_N
        if self.min_p > 0:
            shifted_V = np.where(shifted_V >= math.log(self.min_p), shifted_V, np.float32(-np.inf))
        if self.top_p == 1:
            return np.flatnonzero(shifted_V > -np.inf)
        return np.flatnonzero(_nucleus(shifted_V, np.exp(shifted_V) if weight_V is None else weight_V, self.top_p))

    def _of_candidates(self, shifted_V: np.ndarray, weight_V: np.ndarray | None) -> np.ndarray | None:
        """None where more may be left than the candidates, which is never so with top_k. weight_V: of which top_p is a
        share, where it is not that of the candidates that the other cuts leave."""
        ids_N, are_all = largest(shifted_V, max(_CANDIDATES, self.top_k + 1))
        values_N = shifted_V[ids_N]
        ranked_N = -np.sort(-values_N)
        count = len(ranked_N)
        if self.min_p > 0:
            count = int(np.count_nonzero(ranked_N >= math.log(self.min_p)))
        if self.top_k > 0:
            count = min(count, self.top_k)
        if self.top_p < 1 and (are_all or count < len(ranked_N) or weight_V is not None):
            ranked_weights = np.exp(ranked_N[:count]).astype(np.float64)
            total = ranked_weights.sum() if weight_V is None else weight_V.sum(dtype=np.float64)
            count = _leading(ranked_weights, self.top_p * float(total))
        if count == len(ids_N) and not are_all:
            return None
        return ids_N[_first(values_N, count, ranked_N[count - 1])]


def draw_cut(logits_V: np.ndarray, cuts: Cuts, temperature: float, uniform: float) -> tuple[int, float]:
    """The next token and its log-probability among the tokens left. As `draws.choose`, of one row."""
    shifted_V = logits_V / np.float32(temperature)
    shifted_V -= shifted_V.max()
    ids_N = cuts.kept(shifted_V)
    shifted_N = shifted_V[ids_N]
    cumulative_N = np.cumsum(np.exp(shifted_N), dtype=np.float64)
    total = cumulative_N[-1]
    # A draw just below 1 may round up to the total, which no entry exceeds.
    place = np.searchsorted(cumulative_N, min(uniform * total, np.nextafter(total, 0)), side="right")
    return int(ids_N[place]), float(shifted_N[place] - np.float32(np.log(total)))


def largest(values_V: np.ndarray, count: int) -> tuple[np.ndarray, bool]:
    """The ids, ascending, of at least `count` values and of every value that is as large as one of them.

    Also whether all values are among them but those of minus infinity.
    """
    size = len(values_V) // (_GROUPS_PER_CANDIDATE * count)
    if size < 2:
        return np.arange(len(values_V)), True
    groups = len(values_V) // size
    grouped = values_V[: groups * size].reshape(size, groups)
    best = np.concatenate((grouped.max(axis=0), values_V[groups * size :]))
    least = np.partition(best, len(best) - count)[len(best) - count]
    if least == -np.inf:
        return np.flatnonzero(values_V > -np.inf), True
    return np.flatnonzero(values_V >= least), False


def _leading(weight_N: np.ndarray, sum_wanted: float) -> int:
    """How many of the first weights, at least one, it takes to sum up to so much; all of them where that is not enough.

    Sums of blocks come first: a running sum over a vocabulary takes longer than its sort."""
    block_sums = np.add.reduceat(weight_N, np.arange(0, len(weight_N), _BLOCK))
    before_blocks = np.cumsum(block_sums) - block_sums
    block = max(0, int(np.count_nonzero(before_blocks < sum_wanted)) - 1)
    inside = weight_N[block * _BLOCK : (block + 1) * _BLOCK]
    before_inside = before_blocks[block] + np.cumsum(inside) - inside
    return max(1, block * _BLOCK + int(np.count_nonzero(before_inside < sum_wanted)))


def _nucleus(values_N: np.ndarray, weight_N: np.ndarray, share: float) -> np.ndarray:
    """Which are the fewest, largest ones first, whose weights (the exponentials) are at least this share of all."""
    total = float(weight_N.sum(dtype=np.float64))
    # What is left out is counted: of small weights a sample tells the sum, while some large ones may be most of theirs.
    step = -(-len(values_N) // _SAMPLE)
    sample = np.sort(values_N[::step])
    place = int(np.searchsorted(np.cumsum(np.exp(sample), dtype=np.float64) * step, (1 - share) * total))
    least = sample[max(0, place - _SAMPLE_ERROR)] if place > _SAMPLE_ERROR else -np.inf
    most = sample[place + _SAMPLE_ERROR] if place + _SAMPLE_ERROR < len(sample) else np.inf
    above_N = values_N > most
    near = -np.sort(-values_N[(values_N >= least) & ~above_N])
    near_weights = np.exp(near).astype(np.float64)
    missing = share * total - float((weight_N * above_N).sum(dtype=np.float64))
    if not 0 < missing <= near_weights.sum():
        above_N, near, missing = np.zeros_like(above_N), -np.sort(-values_N), share * total
        near_weights = np.exp(near).astype(np.float64)
    inside = _leading(near_weights, missing)
    return _first(values_N, int(np.count_nonzero(above_N)) + inside, near[inside - 1])


def _first(values_N: np.ndarray, count: int, least: np.float32) -> np.ndarray:
    """Which are the `count` largest, of which `least` is the smallest; of equal ones the first."""
    kept_N: np.ndarray = values_N > least
    missing = count - int(np.count_nonzero(kept_N))
    kept_N[np.flatnonzero(values_N == least)[:missing]] = True
    return kept_N
