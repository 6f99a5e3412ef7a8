"""What changes an answer's logits before its draw: `logit_bias`, `min_tokens` and the penalties.

Shapes: letters as in `models.shapes`; N tokens that an edit concerns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from twinloop.serving.engine.sampling.bounds import bounded


class Edit(Protocol):
    """A change of one answer's logits, token by token."""

    def apply(self, logits_V: np.ndarray) -> None:
        """Change the logits of the next token, in place."""

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""


@dataclass(frozen=True, kw_only=True)
class Edits:
    """They act in this order: no stop token before min_tokens of the answer; logit_bias, by token id, is added;
    repetition_penalty divides positive logits of tokens of the prompt and of the answer so far, and multiplies negative
    ones; frequency_penalty is subtracted for each time that a token is in the answer, presence_penalty once."""

    min_tokens: int = bounded(0, lambda count: count >= 0, "at least 0")
    logit_bias: Mapping[int, float] | None = bounded(
        None,
        lambda biases: all(token >= 0 and -100 <= bias <= 100 for token, bias in (biases or {}).items()),
        "numbers between -100 and 100 by token id",
    )
    repetition_penalty: float = bounded(1.0, lambda factor: 0.01 <= factor <= 100, "between 0.01 and 100")
    frequency_penalty: float = bounded(0.0, lambda penalty: -2 <= penalty <= 2, "between -2 and 2")
    presence_penalty: float = bounded(0.0, lambda penalty: -2 <= penalty <= 2, "between -2 and 2")

    def start_edits(self, prompt: Sequence[int], stop: Sequence[int]) -> list[Edit]:
        """The edits of a new answer; none where nothing is changed."""
        edits: list[Edit] = []
        if self.min_tokens and stop:
            edits.append(_NoStop(self.min_tokens, stop))
        if self.logit_bias:
            edits.append(_Bias(self.logit_bias))
        if self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty:
            edits.append(_Penalties(self, prompt if self.repetition_penalty != 1 else ()))
        return edits


class _NoStop:
    def __init__(self, count: int, stop: Sequence[int]):
        self._left, self._stop_N = count, np.array(stop)

    def apply(self, logits_V: np.ndarray) -> None:
        if self._left > 0:
            logits_V[self._stop_N] = -np.inf

    def accept(self, token: int) -> None:
        self._left -= 1


class _Bias:
    def __init__(self, biases: Mapping[int, float]):
        self._ids_N = np.array(list(biases))
        self._bias_N = np.array(list(biases.values()), np.float32)

    def apply(self, logits_V: np.ndarray) -> None:
        logits_V[self._ids_N] += self._bias_N

    def accept(self, token: int) -> None:
        pass


class _Penalties:
    """Counts are kept of the tokens that occur, not of the vocabulary."""

    def __init__(self, penalties: Edits, prompt: Sequence[int]):
        self._penalties = penalties
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids: np.ndarray = np.zeros(2 * len(self._place) + 64, np.int64)
        self._ids[: len(self._place)] = list(self._place)
        self._counts: np.ndarray = np.zeros(len(self._ids), np.float32)

    def apply(self, logits_V: np.ndarray) -> None:
        ids_N, count_N = self._ids[: len(self._place)], self._counts[: len(self._place)]
        penalties, seen_N = self._penalties, logits_V[ids_N]
        if penalties.repetition_penalty != 1:
            factor = penalties.repetition_penalty
            seen_N = np.where(seen_N > 0, seen_N / factor, seen_N * factor)
        logits_V[ids_N] = (
            seen_N - penalties.frequency_penalty * count_N - penalties.presence_penalty * np.minimum(count_N, 1)
        )

    def accept(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids, self._counts = (
                np.concatenate((each, np.zeros_like(each))) for each in (self._ids, self._counts)
            )
        self._ids[place] = token
        self._counts[place] += 1
