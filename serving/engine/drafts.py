"""Several tokens of an answer from one pass: a guess at them is computed as they are, and kept as far as it is right.

An answer that quotes its prompt goes on as the prompt did, and a grammar often leaves one text only. One sequence at a
time: the attention operator appends several tokens to one row of a batch, not to more (ONNX Runtime 1.31). Each token
is drawn as it is without drafts, so answers are the same, greedy and sampled, except where rounding decides.
"""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np

from twinloop.serving.engine.pace import Rate
from twinloop.serving.engine.slots import Drawn, SlotBatch

DRAFT_TOKENS = 7
"""Tokens of a guess at most. Whether computing them costs less than it saves is measured as answers go on."""

_NGRAMS = (3, 2)
"""Tokens by which an earlier place is found: the more, the surer it goes on in the same way."""

_TRIAL, _REST = 4, 128  # where guesses do not pay: so many passes with one, then so many steps without
_PLAIN_EVERY = 64  # so that the time of a plain step is of now


def look_up(tokens_L: np.ndarray, most: int) -> list[int]:
    """What followed an earlier place where these tokens read as at their end: at most `most`, or none.

    The latest place that so many tokens follow, or else the first: text that repeats itself has one at its very end.
    """
    for length in _NGRAMS:
        starts = len(tokens_L) - length  # before that of the end itself
        if starts < 1:
            continue
        same = np.ones(starts, bool)
        for offset in range(length):
            same &= tokens_L[offset : offset + starts] == tokens_L[offset - length]
        if len(places := np.flatnonzero(same)):
            early = places[places <= starts - most]
            after = int(early[-1] if len(early) else places[0]) + length
            guess: list[int] = tokens_L[after : after + most].tolist()
            return guess
    return []


class Drafts:
    """Advances the sequences of a batch: with guesses where these have saved time lately, and by plain steps.

    Both are measured as they go, in seconds a token. Where guesses do not pay, they rest, and are tried again later:
    those that a grammar forces and those that were looked up by themselves, since the first are nearly always right.
    guesses, drafted, accepted: so far, the tokens in them, and those of them that were right.
    """

    def __init__(self, batch: SlotBatch, most: int = DRAFT_TOKENS):
        """most: tokens of a guess; 0 takes plain steps only."""
        self._batch, self._most = batch, most
        self.guesses = self.drafted = self.accepted = 0
        self._plain = Rate()
        self._worth: defaultdict[tuple[bool, bool], _Worth] = defaultdict(_Worth)  # of greedy ones, of forced tokens
        self._since_plain = 0

    def step(self) -> list[Drawn]:
        """As `SlotBatch.step`: one token for every sequence, or several for the only one."""
        if len(self._batch.decoding) > 1:
            return [self._batch.step()]
        guess, worth = self._guess()
        started = time.perf_counter()
        drawn = self._batch.step_along(guess) if guess else [self._batch.step()]
        seconds = time.perf_counter() - started
        if worth is not None:
            worth.guessed.add(seconds, len(drawn))
            self._since_plain += 1
            self.guesses += 1
            self.drafted += len(guess)
            self.accepted += len(drawn) - 1
        else:
            self._plain.add(seconds, 1)
            self._since_plain = 0
        return drawn

    def _guess(self) -> tuple[list[int], _Worth | None]:
        """A guess, and what those of its kind have been worth; or none."""
        if not self._most or not self._plain.count or self._since_plain >= _PLAIN_EVERY:
            return [], None
        sequence, greedy = self._batch.alone(), self._batch.greedy_alone
        most = min(self._most, sequence.left - 1)
        if most < 1:
            return [], None
        forced = sequence.forced[:most]
        worth = self._worth[greedy, bool(forced)]
        if not worth.pays(self._plain):
            return [], None
        guess = forced or look_up(sequence.tokens_L, most)
        return guess, worth if guess else None


class _Worth:
    """Whether guesses save time: they rest where they did not lately, and are tried again later."""

    def __init__(self) -> None:
        self.guessed = Rate()
        self._rested = 0

    def pays(self, plain: Rate) -> bool:
        if self.guessed.count < _TRIAL or self.guessed.per_token < plain.per_token:
            return True
        self._rested += 1
        if self._rested <= _REST:
            return False
        self._rested, self.guessed = 0, Rate()
        return True
