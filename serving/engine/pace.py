"""How much of prompts is read between two decode steps, so that streams go on evenly; and what things cost lately."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from twinloop.serving.engine.slots import PromptRead

T = TypeVar("T")

STEPS = 3.0
"""Decode steps that may pass in the time in which prompts are read: a stream waits for one step more than these."""
UNSEEN_S = 0.02
"""A pause that nobody sees. Reading in smaller pieces would only cost time."""
LEAST_TOKENS = 32
"""Fewer at a time cost far more a token: 64 of SmolLM2-135M in int8 take 7% more each than 128."""

_KEPT = 0.9  # of what was measured before, by each new measurement


class Rate:
    """Seconds a token, of the latest measurements."""

    def __init__(self) -> None:
        self.count = 0
        self._seconds = self._tokens = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        self.count += 1
        self._seconds = _KEPT * self._seconds + seconds
        self._tokens = _KEPT * self._tokens + tokens

    @property
    def per_token(self) -> float:
        return self._seconds / self._tokens


class Pace:
    """Of one scheduler, by what its steps and prompts took lately."""

    def __init__(self, most: int):
        """most: tokens of prompts between two steps."""
        self._most = most
        self._steps, self._prompts = Rate(), Rate()

    def tokens(self, *, streams: bool) -> int:
        """Of prompts that may be computed now. streams: whether anybody waits for the next step."""
        if not streams or not self._steps.count or not self._prompts.count:
            return self._most
        seconds = max(STEPS * self._steps.per_token, UNSEEN_S)
        return min(self._most, max(LEAST_TOKENS, int(seconds / self._prompts.per_token)))

    def step(self, work: Callable[[], T]) -> T:
        """A decode step of all streams, whatever its tokens."""
        started = time.perf_counter()
        done = work()
        self._steps.add(time.perf_counter() - started, 1)
        return done

    def read(self, work: Callable[[], PromptRead]) -> PromptRead:
        """A piece of a prompt; what is only copied says nothing."""
        started = time.perf_counter()
        read = work()
        if read.computed:
            self._prompts.add(time.perf_counter() - started, read.computed)
        return read
