"""From a scheduler's stream of tokens to text: stop strings, the reason for the end, and the time to first token."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import ConstraintError
from twinloop.serving.engine.slots import FinishReason
from twinloop.serving.engine.stream import Stream, Timings


class GivenUpError(Exception):
    """The answer was cancelled before its end; what there is of it must not pass for the whole."""


class CallError(ConstraintError):
    """The calls of an answer cannot be held to their tools any further."""


class TextStream:
    """The text of one answer, piece by piece; all pieces together are the same whether or not anybody streams them.
    A piece is what all tokens that are ready make: a reader slower than the engine gets fewer and longer ones.

    `stop` strings end the answer and are not part of it: text that may be the beginning of one is held back. From
    `calls` on, where the answer comes to it, they are a part like any other.
    `started` is the `time.perf_counter()` at which the request arrived. Iterate once; what the answer ended with
    is in the attributes afterwards, and `end` is "abort" until it is complete. Iterating raises GivenUpError for an
    answer that was cancelled.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: ChatTokenizer,
        *,
        started: float,
        stop: Sequence[str] = (),
        calls: str | None = None,
    ):
        self.completion_tokens = 0
        self.finish_reason: FinishReason = "length"
        self.ttft_s: float | None = None
        self.total_s: float | None = None
        self.end: Literal["stop", "length", "abort", "error"] = "abort"
        self._stream = stream
        self._tokenizer = tokenizer
        self._started = started
        self._stop = tuple(stop)
        self._calls = (calls,) if calls and stop else ()

    @property
    def prompt_tokens(self) -> int:
        return len(self._stream.prompt)

    @property
    def timings(self) -> Timings:
        """Of the engine, so far."""
        return self._stream.timings

    @property
    def queue_s(self) -> float | None:
        """Seconds that the request waited for a slot, once it has had one."""
        return self._stream.timings.queue_s

    def cancel(self) -> None:
        """Free the slot; may be called from any thread, and again."""
        self._stream.cancel()

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._pieces()
        except GivenUpError:
            raise
        except Exception:
            self.end = "error"
            raise
        self.end = self.finish_reason
        self.total_s = time.perf_counter() - self._started

    def _pieces(self) -> Iterator[str]:
        decoder = self._tokenizer.decoder_stream()
        held = ""
        for tokens in self._stream.bursts():
            if self.ttft_s is None:
                self.ttft_s = time.perf_counter() - self._started
            for token in tokens:
                self.completion_tokens += 1
                held += decoder.push(token)
                end = len(held) if token in self._tokenizer.stop_ids else self._stop_at(held)
                if end is not None:
                    self.finish_reason = "stop"
                    self.cancel()
                    if end:
                        yield held[:end]
                    return
            keep = self._possible_stop(held)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        if self._stream.finish_reason == "cancelled":
            raise GivenUpError("the answer was given up")
        held += decoder.finish()
        if held:
            yield held

    def _stop_at(self, text: str) -> int | None:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        end = min(places, default=None)
        if any(0 <= text.find(calls) <= (len(text) if end is None else end) for calls in self._calls):
            self._stop = self._calls = ()
            return None
        return end

    def _possible_stop(self, text: str) -> int:
        """The length of the text's longest end with which a stop string begins."""
        awaited = self._stop + self._calls
        longest = max(map(len, awaited), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(each.startswith(text[-length:]) for each in awaited):
                return length
        return 0


def interleaved(texts: Sequence[TextStream]) -> Iterator[tuple[int, str | None]]:
    """The pieces of several texts as they come, each with its text's index, and None after a text's last one.

    Raises what the first text raises that does; the caller then cancels the others, which end their threads.
    """
    events: queue.SimpleQueue[tuple[int, str | None] | Exception] = queue.SimpleQueue()

    def read(index: int) -> None:
        try:
            for piece in texts[index]:
                events.put((index, piece))
            events.put((index, None))
        except Exception as error:  # it is the reader's
            events.put(error)

    for index in range(len(texts)):
        threading.Thread(target=read, args=(index,), name="text", daemon=True).start()
    running = len(texts)
    while running:
        event = events.get()
        if isinstance(event, Exception):
            raise event
        yield event
        running -= event[1] is None
