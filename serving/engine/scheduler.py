"""Many callers, one engine: a thread owns it, and every answer of a request is a stream of tokens.

Each round computes a bounded piece of the prompts that wait, by priority and then in order of arrival, and takes one
batched decode step of all that answer. So a long prompt delays running answers by one piece, not by its whole. A prompt
gets its slot when it is the next to be computed, and goes on from what any slot then holds of its beginning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import fields
from functools import partial
from typing import Any, Self

from twinloop.serving.engine.adapters import LoadedAdapter
from twinloop.serving.engine.counts import SchedulerMetrics, Totals
from twinloop.serving.engine.drafts import DRAFT_TOKENS, Drafts
from twinloop.serving.engine.engine import Engine
from twinloop.serving.engine.held_adapters import HeldAdapters
from twinloop.serving.engine.pace import Pace
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.slot_samplers import SlotConstraintError
from twinloop.serving.engine.slots import Drawn, Prompt, SlotBatch
from twinloop.serving.engine.stream import Stream, StreamEnd
from twinloop.serving.engine.waiting import WaitingQueue

log = logging.getLogger(__name__)

_RATE_WINDOW_S = 10.0


class QueueFullError(Exception):
    """As many requests wait as may: try again later (HTTP 429)."""


class SchedulerClosedError(QueueFullError):
    """The scheduler takes no more requests: it is shutting down, or has (HTTP 503)."""


class EngineDiedError(SchedulerClosedError):
    """The engine's thread has ended with an error: only a new process answers again (HTTP 503)."""


class Place:
    """Places in the queue for the answers of one request; held until its prompt is submitted or the `with` block
    ends."""

    def __init__(self, scheduler: Scheduler, answers: int):
        self._scheduler = scheduler
        self._answers = answers
        self._adapter: LoadedAdapter | None = None
        self._held = True

    def use(self, adapter: LoadedAdapter | None) -> None:
        """The adapter of the answers, one of `Scheduler.adapters`, once; None, as without, is the model's own. Raises
        AdapterDroppedError."""
        assert self._adapter is None
        self._scheduler.adapters.use(adapter, self._answers)
        self._adapter = adapter

    def submit(
        self, tokens: Sequence[int], params: SamplingParams, *, priority: int = 0, prompt_logprobs: int | None = None
    ) -> list[Stream]:
        """Queue a prompt in these places, once; it is computed once for all of its answers.

        Answer i is number i to the seed. Each ends at max_tokens or when its slot is full. priority: of those that
        wait, the lowest is next. prompt_logprobs: as `Prompt.top_logprobs`. Raises UserError for a prompt that does not
        fit, SchedulerClosedError where the scheduler was closed since.
        """
        assert self._held, "a place is for one request"
        prompt = Prompt(list(tokens), self._adapter, prompt_logprobs)
        streams = [Stream(prompt, params, sequence, priority) for sequence in range(self._answers)]
        self._scheduler._fill_places(streams)
        self._held = False
        return streams

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._held = False
            self._scheduler._give_back_places(self._answers, self._adapter)


class Scheduler:
    """Owns the engine from now on. `queue_size` answers may wait beside those in the slots.

    adapters: those beside the model's own, for requests that name one.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue_size: int = 64,
        prefill_tokens: int = 128,
        draft_tokens: int = DRAFT_TOKENS,
        on_death: Callable[[], None] = lambda: None,
    ):
        """prefill_tokens: prompt tokens computed between two decode steps at most; `Pace` takes fewer where streams
        would wait long. 128 are computed as fast a token as 256 (SmolLM2-135M, int8). draft_tokens: as `Drafts.most`.
        on_death: is called by the engine's thread where an error ends it while it takes requests."""
        self._engine, self._queue_size = engine, queue_size
        self._pace = Pace(prefill_tokens)
        self._lock = threading.Condition()
        self._waiting = WaitingQueue()
        self._reserved = 0  # places of requests that are still prepared
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.adapters = HeldAdapters(engine, self._between_rounds)
        self._closing = False
        self.died = False
        """Whether an error has ended the engine's thread."""
        self._on_death = on_death
        self._batch = SlotBatch(engine)
        self._drafts = Drafts(self._batch, draft_tokens)
        self._streams: list[Stream | None] = [None] * engine.slots
        self._counts = {each.name: 0 for each in fields(Totals)}
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
        """Answers that it can hold at once, waiting or in a slot: a request has one or more."""
        return self._queue_size + self._engine.slots

    @property
    def queued(self) -> int:
        """Answers that wait for a slot, or for the prompts before theirs."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Answers that have a slot."""
        return sum(stream is not None for stream in self._streams)

    @property
    def full(self) -> bool:
        """Whether a request for one more answer would be refused at this moment."""
        return self._places < 1

    @property
    def _places(self) -> int:
        """Places that answers can still get."""
        # Free slots count too: the engine's thread fetches who waits for them within a round.
        return self.capacity - len(self._waiting) - self.active - self._reserved

    @property
    def running(self) -> bool:
        """Whether the engine's thread lives and takes requests."""
        return self._thread.is_alive() and not self._closing

    def reserve(self, answers: int = 1) -> Place:
        """Places for the answers of a request whose prompt is still to be made, so that one that must be refused costs
        no more.

        Use it as a context manager: it gives back a place that nothing was submitted to. Raises QueueFullError.
        """
        with self._lock:
            self._check_open()
            if self._places < answers:
                raise QueueFullError(f"{len(self._waiting)} requests wait already; try again in a moment")
            self._reserved += answers
        return Place(self, answers)

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Stream:
        """Queue a prompt for one answer, as `Place.submit` does. Raises like `reserve` and that."""
        with self.reserve() as place:
            (stream,) = place.submit(prompt, params)
        return stream

    def _check_open(self) -> None:
        if self.died:
            raise EngineDiedError("the model's engine has ended with an error and takes no more requests")
        if self._closing or not self._thread.is_alive():
            raise SchedulerClosedError("the model is shutting down and takes no more requests")

    def _fill_places(self, streams: Sequence[Stream]) -> None:
        self._engine.check_prompt(streams[0].prompt.tokens)
        with self._lock:
            self._check_open()
            self._reserved -= len(streams)
            self._waiting.add(streams)
            self._lock.notify()

    def _give_back_places(self, answers: int, adapter: LoadedAdapter | None) -> None:
        with self._lock:
            self._reserved -= answers
        self.adapters.leave(adapter, answers)

    def _between_rounds(self, work: Callable[[], Any]) -> Future[Any]:
        """Let the engine's thread do it, before its next round. The future raises SchedulerClosedError."""
        done: Future[Any] = Future()
        with self._lock:
            try:
                self._check_open()
                self._errands.append((work, done))
                self._lock.notify()
            except SchedulerClosedError as error:
                done.set_exception(error)
        return done

    def metrics(self) -> SchedulerMetrics:
        """A snapshot."""
        now = time.perf_counter()
        recent = [entry for entry in list(self._recent) if entry[0] >= now - _RATE_WINDOW_S]
        tokens = self._counts["completion_tokens"]
        rate = (tokens - recent[0][1]) / max(now - recent[0][0], 1e-9) if recent else 0.0
        return SchedulerMetrics(
            queued=self.queued,
            active=self.active,
            slots=self._engine.slots,
            tokens_per_s=rate,
            totals=Totals(**self._counts),
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
                was_serving, self._closing, self.died = not self._closing, True, True
            try:
                self._drop(list(self._waiting), "error", error)
                for _, done in self._errands:
                    done.set_exception(error)
                self._fail(range(self._engine.slots), error)
            finally:
                if was_serving:
                    self._on_death()

    def _work_comes(self) -> bool:
        """Wait for a request or an errand. False once the scheduler is closed and everything answered."""
        with self._lock:
            while not self._waiting and not self.active and not self._errands:
                if self._closing:
                    return False
                self._lock.wait()
        return True

    def _round(self) -> None:
        while self._errands:
            self._run_errand(*self._errands.popleft())
        self._end_for_readers()
        self._read_prompts()
        if slots := self._batch.decoding:
            try:
                for drawn in self._pace.step(self._drafts.step):
                    self._deliver(drawn)
                self._counts["drafts"] = self._drafts.guesses
                self._counts["draft_tokens"] = self._drafts.drafted
                self._counts["accepted_tokens"] = self._drafts.accepted
            except SlotConstraintError as error:
                log.warning("an answer cannot keep its form: %s", error)
                self._fail([error.slot], error)
            except Exception as error:  # the cause may be any of them: those in the step fail, the others go on
                log.exception("a decode step failed")
                self._fail(slots, error)

    def _run_errand(self, work: Callable[[], Any], done: Future[Any]) -> None:
        try:
            done.set_result(work())
        except Exception as error:  # for who asked: the answers go on
            done.set_exception(error)

    def _end_for_readers(self) -> None:
        for slot, stream in enumerate(self._streams):
            if stream is not None and stream.reader_end is not None:
                self._release(slot, stream.reader_end)
        if given_up := [stream for stream in self._waiting if stream.reader_end is not None]:
            self._drop(given_up, "cancelled")

    def _drop(self, streams: Collection[Stream], reason: StreamEnd, error: BaseException | None = None) -> None:
        """End streams that wait."""
        with self._lock:
            self._waiting.remove(streams)
        for stream in streams:
            self._finish(stream, reason, error)

    def _admit(self) -> bool:
        """Give free slots to who is next, to the answers of one request at once. Returns whether that was done: not
        where there are none, or nobody waits, or it failed."""
        free = self._batch.free
        with self._lock:
            streams = self._waiting.choose()[:free] if free else []
        if not streams:
            return False
        prompt = streams[0].prompt
        first = prompt.cached_tokens is None  # answers that find no slot beside the first ones come later
        try:
            slots = self._batch.admit_reusing(prompt, streams[0].params, [stream.sequence for stream in streams])
        except Exception as error:  # caused by this prompt or its sampling: the others go on
            log.exception("a prompt got no slot")
            self._drop(streams, "error", error)
            return False
        with self._lock:  # a place is never seen as free in between
            self._waiting.remove(streams)
            for slot, stream in zip(slots, streams, strict=True):
                self._streams[slot] = stream
        if first:
            self._counts["prompt_tokens"] += prompt.cached_tokens or 0
            self._counts["prefix_cache_queries"] += len(prompt.tokens)
            self._counts["prefix_cache_hits"] += prompt.cached_tokens or 0
        for stream in streams:
            stream.started()
        return True

    def _read_prompts(self) -> None:
        """Compute prompts in order of arrival, up to the token budget of a round. What is taken over from other slots
        counts too: else any number of prompts of which little is left would come between two decode steps."""
        budget = self._pace.tokens(streams=bool(self._batch.decoding))
        while budget > 0 and (self._batch.reading or self._admit()):
            slots = self._batch.reading
            try:
                read = self._pace.read(partial(self._batch.read_prompt, budget))
                budget -= read.cost
                self._counts["prompt_tokens"] += read.computed
                if read.drawn is not None:
                    self._deliver(read.drawn)
            except SlotConstraintError as error:
                log.warning("an answer cannot keep its form: %s", error)
                self._fail([error.slot], error)
            except Exception as error:  # caused by this prompt or its sampling: the others go on
                log.exception("a prompt failed")
                self._fail(slots, error)

    def _deliver(self, drawn: Drawn) -> None:
        """Hand every drawn token to its stream, and end the streams that are complete."""
        now = time.perf_counter()
        for slot, token, logprob, stopped, ended, report in zip(
            drawn.slots.tolist(),
            drawn.tokens.tolist(),
            drawn.logprobs.tolist(),
            drawn.stopped.tolist(),
            drawn.ended.tolist(),
            map(drawn.reports.get, range(len(drawn.slots))),
            strict=True,
        ):
            stream = self._streams[slot]
            assert stream is not None
            stream.push(token, logprob, report, now)
            if ended:
                self._end(slot, "stop" if stopped else "length")
        self._counts["completion_tokens"] += len(drawn.slots)
        self._recent.append((now, self._counts["completion_tokens"]))
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
        self._finish(stream, reason, error)

    def _finish(self, stream: Stream, reason: StreamEnd, error: BaseException | None) -> None:
        self._counts["failed" if reason == "error" else "cancelled" if reason == "cancelled" else "finished"] += 1
        self.adapters.leave(stream.prompt.adapter, 1)
        stream.end(reason, error)
