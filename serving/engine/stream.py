"""What one caller of the scheduler gets: the tokens of an answer as they are drawn."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from twinloop.serving.engine.sampling import SamplingParams, TokenReport
from twinloop.serving.engine.slots import FinishReason, Prompt

StreamEnd = Literal[FinishReason, "cancelled", "error"]


@dataclass
class Timings:
    """Seconds. queue_s: waiting for a slot; ttft_s: from submit to the first token; token_s: gaps after it."""

    queue_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    token_s: list[float] = field(default_factory=list)


class Stream:
    """One answer as it comes: iterate over its token ids, or over `bursts` of them, once. Raises what went wrong with
    the request, if it did.

    `cancel` and `finish` may be called from any thread and free the slot before the next step; of both, the first call
    counts. submitted: when (`time.perf_counter`). `finish_reason` is set once the iteration has ended, `timings` during
    it. `logprobs` and `reports` have an entry a token, `reports` where the parameters ask for them.
    """

    def __init__(self, prompt: Prompt, params: SamplingParams, sequence: int, priority: int):
        """sequence: the answer's number to the seed, of those that share the prompt. priority: as `Place.submit`."""
        self.prompt, self.params, self.sequence, self.priority = prompt, params, sequence, priority
        self.timings = Timings()
        self.logprobs: list[float] = []
        self.reports: list[TokenReport] = []
        self.finish_reason: StreamEnd | None = None
        self.reader_end: Literal["stop", "cancelled"] | None = None
        """With which its reader ends it, before the engine does."""
        self._events: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.submitted = self._latest = time.perf_counter()
        self._ended = False
        self._complete = threading.Event()

    def cancel(self) -> None:
        """Give the answer up. Tokens that are computed already may still come."""
        self.reader_end = self.reader_end or "cancelled"

    def finish(self) -> None:
        """Take it as complete, such as at a stop string. Tokens that are computed already may still come."""
        self.reader_end = self.reader_end or "stop"

    def wait(self) -> None:
        """Wait for the end, which no token interrupts; nothing is read by it, and nothing raised."""
        self._complete.wait()

    def __iter__(self) -> Iterator[int]:
        for tokens in self.bursts():
            yield from tokens

    def bursts(self) -> Iterator[list[int]]:
        """The token ids, each time all that have come since: one for a reader that is as fast as the engine."""
        while not self._ended:
            events = [self._events.get()]
            with suppress(queue.Empty):
                while True:
                    events.append(self._events.get_nowait())
            tokens = [event for event in events if isinstance(event, int)]
            self._ended = len(tokens) < len(events)
            if tokens:
                yield tokens
            if isinstance(error := events[-1], BaseException):
                raise error

    def prompt_logits(self) -> np.ndarray:
        """Wait for the end: what the network gave to the prompt's last token, float32 [V], or of a head its labels."""
        for _ in self:
            pass
        assert self.prompt.logits_V is not None, "it was not cancelled"
        return self.prompt.logits_V

    # --- for the scheduler ----------------------------------------------------------------------------------------

    def started(self) -> None:
        """It has a slot."""
        self.timings.queue_s = time.perf_counter() - self.submitted

    def push(self, token: int, logprob: float, report: TokenReport | None, now: float) -> None:
        """The next token, drawn at `now` (time.perf_counter)."""
        if self.timings.ttft_s is None:
            self.timings.ttft_s = now - self.submitted
        else:
            self.timings.token_s.append(now - self._latest)
        self._latest = now
        self.logprobs.append(logprob)
        if report is not None:
            self.reports.append(report)
        self._events.put(token)

    def end(self, reason: StreamEnd, error: BaseException | None = None) -> None:
        """Nothing comes after this. `error` is raised where the stream is read."""
        self.finish_reason = reason
        self.timings.total_s = time.perf_counter() - self.submitted
        self._events.put(error)
        self._complete.set()
