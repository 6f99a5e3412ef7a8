"""The draw of the next tokens of a whole batch, of rows that ask for no more than a temperature.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

import numpy as np

_BLOCK_BYTES = 1 << 20
"""Of the logits that are drawn from at once: what is computed from them, four times as much, stays in the cache."""


def uniform_draws(seed: int | None, sequence: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) that decide a sequence's tokens, float64 [count]. More begin like fewer."""
    if seed is None:
        return np.random.default_rng().random(count)
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, sequence], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def choose(logits_BV: np.ndarray, temperature_B: np.ndarray, uniform_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Next tokens, int64 [B], and their log-probabilities, float32 [B], under the distribution drawn from.

    That is the softmax of logits / temperature. At temperature 0 the likeliest token is taken, and its log-probability
    is the plain softmax's.
    """
    if (temperature_B == 0).all():
        return _likeliest(logits_BV)
    count, rows = len(logits_BV), max(1, _BLOCK_BYTES // (4 * logits_BV.shape[1]))
    if count <= rows:
        return _sampled(logits_BV, temperature_B, uniform_B)
    blocks = [slice(begin, begin + rows) for begin in range(0, count, rows)]
    drawn = [_sampled(logits_BV[block], temperature_B[block], uniform_B[block]) for block in blocks]
    return np.concatenate([tokens for tokens, _ in drawn]), np.concatenate([logprobs for _, logprobs in drawn])


def _sampled(logits_BV: np.ndarray, temperature_B: np.ndarray, uniform_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    greedy_B = temperature_B == 0
    plain = greedy_B.any()
    scale_B = np.where(greedy_B, 1, temperature_B).astype(np.float32) if plain else temperature_B
    scaled_BV = logits_BV if (scale_B == 1).all() else logits_BV / scale_B[:, None].astype(np.float32)
    shifted_BV = scaled_BV - scaled_BV.max(axis=1, keepdims=True)
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
