"""Many callers, one engine: a thread owns it, and every request is a stream of tokens.

Each round gives free slots to waiting requests, computes a bounded piece of the prompts that are being read, and takes
one batched decode step of all that answer. So a long prompt delays running answers by one piece, not by its whole.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from twinloop.serving.engine import Engine
from twinloop.serving.sampling import SamplingParams, choose, uniform_draws

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]

_RATE_WINDOW_S = 10.0


class QueueFullError(Exception):
    """As many requests wait as may: try again later (HTTP 503)."""


class SchedulerClosedError(QueueFullError):
    """The scheduler takes no more requests: it is shutting down, or has."""


@dataclass
class Timings:
    """Seconds. queue_s: waiting for a slot; ttft_s: from submit to the first token; token_s: gaps after it."""

    queue_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    token_s: list[float] = field(default_factory=list)


class Stream:
    """One answer as it comes: iterate over its token ids, once. Raises what went wrong with the request, if it did.

    `cancel` may be called from any thread and frees the slot before the next step. `finish_reason` stands once the
    iteration has ended, `timings` fills as it goes.
    """

    def __init__(self, prompt: Sequence[int], params: SamplingParams):
        self.prompt, self.params = list(prompt), params
        self.timings = Timings()
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.cancelled = False
        self._events: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._submitted = self._latest = time.perf_counter()
        self._ended = False

    def cancel(self) -> None:
        """Give the answer up. Tokens that are computed already may still come."""
        self.cancelled = True

    def __iter__(self) -> Iterator[int]:
        while not self._ended:
            event = self._events.get()
            if isinstance(event, int):
                yield event
                continue
            self._ended = True
            if event is not None:
                raise event

    def _started(self) -> None:
        self.timings.queue_s = time.perf_counter() - self._submitted

    def _push(self, token: int, logprob: float, now: float) -> None:
        if self.timings.ttft_s is None:
            self.timings.ttft_s = now - self._submitted
        else:
            self.timings.token_s.append(now - self._latest)
        self._latest = now
        self.logprobs.append(logprob)
        self._events.put(token)

    def _end(self, reason: FinishReason, error: BaseException | None = None) -> None:
        self.finish_reason = reason
        self.timings.total_s = time.perf_counter() - self._submitted
        self._events.put(error)


@dataclass(frozen=True)
class Totals:
    """Counts since the start: tokens read and written, and how answers ended."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


@dataclass(frozen=True)
class SchedulerMetrics:
    """Requests waiting and in a slot; completion tokens a second over the last ten."""

    queued: int
    active: int
    slots: int
    tokens_per_s: float
    totals: Totals


class Scheduler:
    """Owns the engine from now on. `queue_size` requests may wait beside those in the slots."""

    def __init__(self, engine: Engine, *, queue_size: int = 64, prefill_tokens: int = 256):
        """prefill_tokens: prompt tokens computed between two decode steps at most."""
        self._engine = engine
        self._queue_size, self._prefill_tokens = queue_size, prefill_tokens
        self._lock = threading.Condition()
        self._waiting: deque[Stream] = deque()
        self._closing = False
        slots = engine.slots
        self._streams: list[Stream | None] = [None] * slots
        self._reading: deque[int] = deque()  # slots whose prompt is not computed whole, in order of arrival
        self._answering_S = np.zeros(slots, bool)
        self._next_S = np.zeros(slots, np.int64)
        self._produced_S = np.zeros(slots, np.int64)
        self._temperature_S = np.zeros(slots, np.float32)
        self._top_p_S = np.ones(slots, np.float64)
        self._uniforms: list[np.ndarray] = [np.zeros(1)] * slots
        self._stops: list[frozenset[int]] = [frozenset()] * slots
        self._counts = {"finished": 0, "failed": 0, "cancelled": 0}
        self._prompt_tokens = self._tokens = 0
        self._recent: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)])
        engine.reset()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- for callers, from any thread -----------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._engine.max_length

    @property
    def capacity(self) -> int:
        """Requests that can be in the house at once, waiting or in a slot."""
        return self._queue_size + self._engine.slots

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return sum(stream is not None for stream in self._streams)

    @property
    def running(self) -> bool:
        """Whether the engine's thread lives and takes requests."""
        return self._thread.is_alive() and not self._closing

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Stream:
        """Queue a prompt. Its answer ends at max_tokens or when the slot is full, whichever comes first.

        Raises UserError for a prompt that does not fit, QueueFullError when too many wait.
        """
        self._engine.check_prompt(prompt)
        stream = Stream(prompt, params)
        with self._lock:
            if self._closing or not self._thread.is_alive():
                raise SchedulerClosedError("the model is shutting down and takes no more requests")
            # Free slots count too: the engine's thread fetches who waits for them within a round.
            if len(self._waiting) + self.active >= self.capacity:
                raise QueueFullError(f"{len(self._waiting)} requests wait already; try again in a moment")
            self._waiting.append(stream)
            self._lock.notify()
        return stream

    def metrics(self) -> SchedulerMetrics:
        """A snapshot."""
        now = time.perf_counter()
        recent = [entry for entry in list(self._recent) if entry[0] >= now - _RATE_WINDOW_S]
        rate = (self._tokens - recent[0][1]) / max(now - recent[0][0], 1e-9) if recent else 0.0
        return SchedulerMetrics(
            queued=self.queued,
            active=self.active,
            slots=self._engine.slots,
            tokens_per_s=rate,
            totals=Totals(self._prompt_tokens, self._tokens, **self._counts),
        )

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests and end the thread: after all answers are complete, or at once (`drain=False`)."""
        with self._lock:
            self._closing = True
            if not drain:
                for stream in (*self._waiting, *self._streams):
                    if stream is not None:
                        stream.cancel()
            self._lock.notify()
        self._thread.join(timeout_s)

    # --- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._work_comes():
                self._round()
        except BaseException as error:  # nothing can be answered any more: tell everyone who waits
            log.exception("the engine's thread ends")
            with self._lock:
                self._closing = True
            for stream in self._waiting:
                stream._end("error", error)
            self._fail(range(self._engine.slots), error)

    def _work_comes(self) -> bool:
        """Wait for a request. False once the scheduler is closed and everything answered."""
        with self._lock:
            while not self._waiting and not self.active:
                if self._closing:
                    return False
                self._lock.wait()
        return True

    def _round(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._read_prompts()
        if self._answering_S.any():
            try:
                self._step()
            except Exception as error:  # whose fault it was is unknown: those in the step fail, the others go on
                log.exception("a decode step failed")
                self._fail(np.flatnonzero(self._answering_S).tolist(), error)

    def _drop_cancelled(self) -> None:
        for slot, active in enumerate(self._streams):
            if active is not None and active.cancelled:
                self._release(slot, "cancelled")
        if any(stream.cancelled for stream in tuple(self._waiting)):
            with self._lock:
                dropped = [stream for stream in self._waiting if stream.cancelled]
                self._waiting = deque(stream for stream in self._waiting if not stream.cancelled)
            for stream in dropped:
                self._counts["cancelled"] += 1
                stream._end("cancelled")

    def _admit(self) -> None:
        """Give free slots, lowest first so that the decoded range stays narrow, to those who wait longest."""
        for slot in range(self._engine.slots):
            if self._streams[slot] is not None or not self._waiting:
                continue
            with self._lock:
                stream = self._streams[slot] = self._waiting.popleft()
            stream._started()
            params = stream.params
            self._engine.lengths[slot] = 0
            self._temperature_S[slot] = params.temperature
            self._top_p_S[slot] = params.top_p
            self._stops[slot] = frozenset(params.stop)
            room = min(params.max_tokens, self._engine.max_length - len(stream.prompt))
            self._uniforms[slot] = uniform_draws(params.seed, 0, room)
            self._produced_S[slot] = 0
            self._reading.append(slot)

    def _read_prompts(self) -> None:
        """Compute prompts in order of arrival, up to the budget of a round."""
        budget = self._prefill_tokens
        while self._reading and budget > 0:
            slot = self._reading[0]
            stream = self._streams[slot]
            assert stream is not None
            done = int(self._engine.lengths[slot])
            part = stream.prompt[done : done + budget]
            budget -= len(part)
            try:
                logits_V = self._engine.prefill(slot, part, start=done)
                self._prompt_tokens += len(part)
                if done + len(part) < len(stream.prompt):
                    continue
                self._reading.popleft()
                self._answering_S[slot] = True
                self._take(np.array([slot]), logits_V[None])
            except Exception as error:  # this prompt's fault, or its sampling's: the others go on
                log.exception("a prompt failed")
                self._release(slot, "error", error)

    def _step(self) -> None:
        active = np.flatnonzero(self._answering_S)
        first, end = int(active[0]), int(active[-1]) + 1
        logits = self._engine.decode(first, self._next_S[first:end], self._answering_S[first:end])
        self._take(active, logits if len(active) == end - first else logits[active - first])

    def _take(self, slots: np.ndarray, logits: np.ndarray) -> None:
        """Draw the next token of each slot and hand it to its stream."""
        top_p = self._top_p_S[slots]
        tokens, logprobs = choose(
            logits,
            self._temperature_S[slots],
            np.array([self._uniforms[slot][self._produced_S[slot]] for slot in slots]),
            top_p_B=top_p if (top_p < 1).any() else None,
        )
        self._next_S[slots] = tokens
        self._produced_S[slots] += 1
        now = time.perf_counter()
        for slot, token, logprob in zip(slots.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            stream = self._streams[slot]
            assert stream is not None
            stream._push(token, logprob, now)
            if token in self._stops[slot]:
                self._release(slot, "stop")
            elif self._produced_S[slot] == len(self._uniforms[slot]):
                self._release(slot, "length")
        self._tokens += len(slots)
        self._recent.append((now, self._tokens))
        while self._recent[0][0] < now - _RATE_WINDOW_S:
            self._recent.popleft()

    def _fail(self, slots: Iterable[int], error: BaseException) -> None:
        for slot in slots:
            if self._streams[slot] is not None:
                self._release(slot, "error", error)

    def _release(self, slot: int, reason: FinishReason, error: BaseException | None = None) -> None:
        """End the slot's stream and free the slot. Its content stays until the next prompt comes."""
        stream = self._streams[slot]
        assert stream is not None
        self._streams[slot] = None
        self._answering_S[slot] = False
        if slot in self._reading:
            self._reading.remove(slot)
        self._counts["failed" if reason == "error" else "cancelled" if reason == "cancelled" else "finished"] += 1
        stream._end(reason, error)
