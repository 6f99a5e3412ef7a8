"""The choice of the next token, on the host, for a whole batch at once.

Draws are a function of (seed, sequence, position) and of nothing else: who else sits in the batch, and in which slot,
changes no one's tokens.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from twinloop.common.errors import UserError

GREEDY_BELOW = 1e-6
"""A temperature at which logits that float32 can hardly tell apart are as good as far apart: it is taken as 0."""


class ConstraintError(Exception):
    """An answer cannot be held to its constraint any further; the message says why, in one line."""


class Constraint(Protocol):
    """What an answer must look like. It does not change, and any number of answers may share it."""

    def start(self) -> ConstraintState:
        """The state of a new answer."""


class ConstraintState(Protocol):
    """How far one answer has come."""

    def allowed(self) -> np.ndarray:
        """Which tokens may be next, at least one: uint8 [about V / 8], of which bit i of byte j is token 8 * j + i.

        Tokens beyond its end may not. A stop token may exactly where the answer may end. Valid until the next call.
        Raises ConstraintError.
        """

    def forced(self) -> list[int]:
        """Usual tokens of the text that must come next, as far as there is one only; others may spell it too."""

    def accept(self, token: int) -> None:
        """The answer goes on with this one of the allowed tokens."""


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn.

    temperature 0, or one below GREEDY_BELOW, takes the likeliest token. top_p 1 keeps the whole vocabulary. An answer
    ends with a token of `stop` (which is its last) or after max_tokens. Without a seed every answer is another one. A
    constraint leaves only those tokens to the draw with which the answer keeps its form; `stop` then names the token
    with which that form ends.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    seed: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 100, "between 0 and 100"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (good, words) in bounds.items():
            if not good:
                raise UserError(f"sampling: {name} is {getattr(self, name)}; it must be {words}")
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)


def uniform_draws(seed: int | None, sequence: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) that decide a sequence's tokens, float64 [count]. More begin like fewer."""
    if seed is None:
        return np.random.default_rng().random(count)
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, sequence], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def choose(
    logits_BV: np.ndarray,
    temperature_B: np.ndarray,
    uniform_B: np.ndarray,
    *,
    top_p_B: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Next tokens, int64 [B], and their log-probabilities, float32 [B], under the distribution drawn from.

    That is the softmax of logits / temperature, cut to the smallest set that holds top_p. At temperature 0 the
    likeliest token is taken, and its log-probability is the plain softmax's.
    """
    greedy_B = temperature_B == 0
    if greedy_B.all():
        return _likeliest(logits_BV)
    plain = greedy_B.any()
    scale_B = np.where(greedy_B, 1, temperature_B).astype(np.float32) if plain else temperature_B
    scaled_BV = logits_BV if (scale_B == 1).all() else logits_BV / scale_B[:, None].astype(np.float32)
    shifted_BV = scaled_BV - scaled_BV.max(axis=1, keepdims=True)
    if top_p_B is not None:
        _cut(shifted_BV, np.where(greedy_B, 1, top_p_B))
    cumulative_BV = np.cumsum(np.exp(shifted_BV), axis=1, dtype=np.float64)
    total_B = cumulative_BV[:, -1]
    # A draw just below 1 may round up to the total, which no entry exceeds.
    drawn_B = np.minimum(uniform_B * total_B, np.nextafter(total_B, 0))
    tokens_B = (cumulative_BV > drawn_B[:, None]).argmax(axis=1)
    if plain:
        tokens_B[greedy_B] = logits_BV[greedy_B].argmax(axis=1)
    logprobs_B = shifted_BV[np.arange(len(tokens_B)), tokens_B] - np.log(total_B)
    return tokens_B, logprobs_B.astype(np.float32)


def _likeliest(logits_BV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens_B = logits_BV.argmax(axis=1)
    best_B1 = logits_BV[np.arange(len(tokens_B)), tokens_B][:, None]
    return tokens_B, -np.log(np.exp(logits_BV - best_B1).sum(axis=1))


def _cut(shifted_BV: np.ndarray, top_p_B: np.ndarray) -> None:
    """Set what falls outside top_p to minus infinity, in place."""
    order_BV = np.argsort(-shifted_BV, axis=1, kind="stable")
    weight_BV = np.exp(np.take_along_axis(shifted_BV, order_BV, axis=1)).astype(np.float64)
    before_BV = np.cumsum(weight_BV, axis=1) - weight_BV
    before_BV[:, 0] = -1  # the likeliest is always kept, however small top_p is
    share_B = np.where(top_p_B >= 1, 2.0, top_p_B)  # above 1, so that rounding cuts nothing off the whole
    rank_kept_BV = np.empty(shifted_BV.shape, bool)
    kept_BV = before_BV < (share_B * weight_BV.sum(axis=1))[:, None]  # by rank
    np.put_along_axis(rank_kept_BV, order_BV, kept_BV, axis=1)
    shifted_BV[~rank_kept_BV] = -np.inf
