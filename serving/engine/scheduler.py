"""Many callers, one engine: a thread owns it, and every request is a stream of tokens.

Each round gives free slots to waiting requests, computes a bounded piece of the prompts that are being read, and takes
one batched decode step of all that answer. So a long prompt delays running answers by one piece, not by its whole.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

from twinloop.serving.engine.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.slots import Drawn, Prompt, SlotBatch, SlotConstraintError
from twinloop.serving.engine.stream import Stream, StreamEnd

log = logging.getLogger(__name__)

_RATE_WINDOW_S = 10.0


class QueueFullError(Exception):
    """As many requests wait as may: try again later (HTTP 429)."""


class SchedulerClosedError(QueueFullError):
    """The scheduler takes no more requests: it is shutting down, or has (HTTP 503)."""


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
    """Requests waiting and in a slot; completion tokens a second over the last ten; the share of the key-value cache
    that the sequences in the slots fill."""

    queued: int
    active: int
    slots: int
    tokens_per_s: float
    totals: Totals
    cache_used: float = 0.0


class Place:
    """A place in the queue for one request; held until its prompt is submitted or the `with` block ends."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._held = True

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Stream:
        """Queue the prompt in this place, once. Its answer ends at max_tokens or when the slot is full.

        Raises UserError for a prompt that does not fit, SchedulerClosedError where the scheduler was closed since.
        """
        assert self._held, "a place is for one request"
        stream = self._scheduler._fill_place(prompt, params)
        self._held = False
        return stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._held = False
            self._scheduler._give_back_place()


class Scheduler:
    """Owns the engine from now on. `queue_size` requests may wait beside those in the slots."""

    def __init__(self, engine: Engine, *, queue_size: int = 64, prefill_tokens: int = 256):
        """prefill_tokens: prompt tokens computed between two decode steps at most."""
        self._engine = engine
        self._queue_size, self._prefill_tokens = queue_size, prefill_tokens
        self._lock = threading.Condition()
        self._waiting: deque[Stream] = deque()
        self._reserved = 0  # places of requests that are still prepared
        self._closing = False
        self._batch = SlotBatch(engine)
        self._streams: list[Stream | None] = [None] * engine.slots
        self._counts = {"finished": 0, "failed": 0, "cancelled": 0}
        self._prompt_tokens = self._tokens = 0
        self._recent: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)])
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- for callers, from any thread -----------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._engine.max_length

    @property
    def capacity(self) -> int:
        """Requests that it can hold at once, waiting or in a slot."""
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
    def full(self) -> bool:
        """Whether one more request would be refused at this moment."""
        # Free slots count too: the engine's thread fetches who waits for them within a round.
        return len(self._waiting) + self.active + self._reserved >= self.capacity

    @property
    def running(self) -> bool:
        """Whether the engine's thread lives and takes requests."""
        return self._thread.is_alive() and not self._closing

    def reserve(self) -> Place:
        """A place for a request whose prompt is still to be made, so that one that must be refused costs no more.

        Use it as a context manager: it gives back a place that nothing was submitted to. Raises QueueFullError.
        """
        with self._lock:
            self._check_open()
            if self.full:
                raise QueueFullError(f"{len(self._waiting)} requests wait already; try again in a moment")
            self._reserved += 1
        return Place(self)

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Stream:
        """Queue a prompt, as `Place.submit` does. Raises like `reserve` and that."""
        with self.reserve() as place:
            return place.submit(prompt, params)

    def _check_open(self) -> None:
        if self._closing or not self._thread.is_alive():
            raise SchedulerClosedError("the model is shutting down and takes no more requests")

    def _fill_place(self, prompt: Sequence[int], params: SamplingParams) -> Stream:
        self._engine.check_prompt(prompt)
        stream = Stream(prompt, params)
        with self._lock:
            self._check_open()
            self._reserved -= 1
            self._waiting.append(stream)
            self._lock.notify()
        return stream

    def _give_back_place(self) -> None:
        with self._lock:
            self._reserved -= 1

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
            cache_used=self._batch.cache_used,
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
        except BaseException as error:  # nothing can be answered any more: end every stream with the reason
            log.exception("the engine's thread ends")
            with self._lock:
                self._closing = True
            for stream in self._waiting:
                stream.end("error", error)
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
        if slots := self._batch.decoding:
            try:
                self._deliver(self._batch.step())
            except SlotConstraintError as error:
                log.warning("an answer cannot keep its form: %s", error)
                self._fail([error.slot], error)
            except Exception as error:  # the cause may be any of them: those in the step fail, the others go on
                log.exception("a decode step failed")
                self._fail(slots, error)

    def _drop_cancelled(self) -> None:
        for slot, stream in enumerate(self._streams):
            if stream is not None and stream.cancelled:
                self._release(slot, "cancelled")
        if any(stream.cancelled for stream in tuple(self._waiting)):
            with self._lock:
                dropped = [stream for stream in self._waiting if stream.cancelled]
                self._waiting = deque(stream for stream in self._waiting if not stream.cancelled)
            for stream in dropped:
                self._counts["cancelled"] += 1
                stream.end("cancelled")

    def _admit(self) -> None:
        """Give free slots to those who wait longest."""
        while self._waiting and self._batch.free:
            with self._lock:
                stream = self._waiting[0]
                (slot,) = self._batch.admit(Prompt(stream.prompt), stream.params)
                self._streams[slot] = self._waiting.popleft()
            stream.started()

    def _read_prompts(self) -> None:
        """Compute prompts in order of arrival, up to the token budget of a round."""
        budget = self._prefill_tokens
        while budget > 0 and (slots := self._batch.reading):
            (slot,) = slots
            try:
                count, drawn = self._batch.read_prompt(budget)
                budget -= count
                self._prompt_tokens += count
                if drawn is not None:
                    self._deliver(drawn)
            except SlotConstraintError as error:
                log.warning("an answer cannot keep its form: %s", error)
                self._release(slot, "error", error)
            except Exception as error:  # caused by this prompt or its sampling: the others go on
                log.exception("a prompt failed")
                self._release(slot, "error", error)

    def _deliver(self, drawn: Drawn) -> None:
        """Hand every drawn token to its stream, and end the streams that are complete."""
        now = time.perf_counter()
        for slot, token, logprob, stopped, ended in zip(
            drawn.slots.tolist(),
            drawn.tokens.tolist(),
            drawn.logprobs.tolist(),
            drawn.stopped.tolist(),
            drawn.ended.tolist(),
            strict=True,
        ):
            stream = self._streams[slot]
            assert stream is not None
            stream.push(token, logprob, now)
            if ended:
                self._end(slot, "stop" if stopped else "length")
        self._tokens += len(drawn.slots)
        self._recent.append((now, self._tokens))
        while self._recent[0][0] < now - _RATE_WINDOW_S:
            self._recent.popleft()

    def _fail(self, slots: Iterable[int], error: BaseException) -> None:
        for slot in slots:
            if self._streams[slot] is not None:
                self._release(slot, "error", error)

    def _release(self, slot: int, reason: StreamEnd, error: BaseException | None = None) -> None:
        """End a stream before its answer is complete, and free its slot."""
        self._batch.release(slot)
        self._end(slot, reason, error)

    def _end(self, slot: int, reason: StreamEnd, error: BaseException | None = None) -> None:
        stream = self._streams[slot]
        assert stream is not None
        self._streams[slot] = None
        self._counts["failed" if reason == "error" else "cancelled" if reason == "cancelled" else "finished"] += 1
        stream.end(reason, error)
