"""From a scheduler's stream of tokens to text: stop strings, the reason for the end, and the time to first token."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.sampling import ConstraintError, TokenReport
from twinloop.serving.engine.slots import FinishReason, Prompt
from twinloop.serving.engine.stream import Stream, Timings


class GivenUpError(Exception):
    """The answer was cancelled before its end; what there is of it must not pass for the whole."""


class FormError(ConstraintError):
    """An answer cannot be held any further to what a parameter of its request asks for."""

    def __init__(self, param: str, reason: str):
        super().__init__(reason)
        self.param = param


class ReportedToken(NamedTuple):
    """A token of the text, where in the text it begins, and what the engine reports of it."""

    id: int
    begin: int
    report: TokenReport


class TextStream:
    """The text of one answer, piece by piece; all pieces together are the same whether or not anybody streams them.
    A piece is what all tokens that are ready make: a reader slower than the engine gets fewer and longer ones.

    `stop` strings end the answer and are not part of it: text that may be the beginning of one is held back. From
    `calls` on, where the answer comes to it, they are a part like any other. silent: nothing of the answer is shown or
    counted, since its prompt is all that is asked for. reports_end: the token with which the model ends it is reported
    too. continues: the text goes on after that of its prompt, so that a space at its beginning is shown. form: the
    parameter that holds the answer to a form, where one does.
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
        silent: bool = False,
        reports_end: bool = False,
        continues: bool = False,
        form: str = "response_format",
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
        self._form = form
        self._calls = (calls,) if calls and stop else ()
        self._silent, self._reports_end, self._continues = silent, reports_end, continues
        self._params = stream.params
        self._waiting: deque[ReportedToken] = deque()  # until the text is a piece in which they begin
        self._released: list[ReportedToken] = []

    @property
    def prompt(self) -> Prompt:
        """The same object for all answers that share it."""
        return self._stream.prompt

    @property
    def timings(self) -> Timings:
        """Of the engine, so far."""
        return self._stream.timings

    @property
    def max_tokens(self) -> int:
        """That the answer may have."""
        return self._params.max_tokens

    def cancel(self) -> None:
        """Free the slot; may be called from any thread, and again."""
        self._stream.cancel()

    def wait(self) -> None:
        """Wait for the whole answer before it is read. A reader that waits for each of its tokens takes the interpreter
        from the engine as often. Where a stop string may end it, it is not waited for: it must be read to be ended."""
        if self._stop:
            return
        self._stream.wait()
        if (ttft_s := self.timings.ttft_s) is not None:
            self.ttft_s = self._stream.submitted + ttft_s - self._started

    def take_reported(self) -> list[ReportedToken]:
        """The tokens whose text begins in the pieces read so far, that were not taken before."""
        taken, self._released = self._released, []
        return taken

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._pieces()
        except GivenUpError:
            raise
        except ConstraintError as error:
            self.end = "error"
            raise FormError(self._form, str(error)) from error
        except Exception:
            self.end = "error"
            raise
        self.end = self.finish_reason
        self.total_s = time.perf_counter() - self._started

    def _pieces(self) -> Iterator[str]:
        decoder = self._tokenizer.decoder_stream(continues=self._continues)
        held, given = "", 0  # text that is decoded and not yet a piece; the length of all pieces
        free = 0  # so much of the text may hold stop strings: the tokens before min_tokens
        for tokens in self._stream.bursts():
            if self.ttft_s is None:
                self.ttft_s = time.perf_counter() - self._started
            for token in () if self._silent else tokens:
                self.completion_tokens += 1
                self._wait(token, given + len(held))
                held += decoder.push(token)
                if self.completion_tokens <= self._params.min_tokens:
                    free = given + len(held)
                ended = token in self._params.stop
                if ended:
                    held += decoder.finish()
                end = len(held) if ended else self._stop_at(held, free - given)
                if end is not None:
                    self.finish_reason = "stop"
                    self._stream.finish()
                    self._release(None if ended else given + end)
                    if end:
                        yield held[:end]
                    return
            if keep := len(held) - self._possible_stop(held):
                given += keep
                piece, held = held[:keep], held[keep:]
                self._release(given)
                yield piece
        if self._stream.finish_reason == "cancelled":
            raise GivenUpError("the answer was given up")
        held += decoder.finish()
        self._release(None)
        if held:
            yield held

    def _wait(self, token: int, begin: int) -> None:
        if self._params.top_logprobs is not None and (self._reports_end or token not in self._params.stop):
            report = self._stream.reports[self.completion_tokens - 1]
            self._waiting.append(ReportedToken(token, begin, report))

    def _release(self, end: int | None) -> None:
        """Of the tokens that wait, those that begin before this place of the text; None: all."""
        while self._waiting and (end is None or self._waiting[0].begin < end):
            self._released.append(self._waiting.popleft())

    def _stop_at(self, text: str, free: int) -> int | None:
        """Where the first stop string begins that ends after `free` characters."""
        begins = ((stop, max(0, free - len(stop) + 1)) for stop in self._stop)
        places = [place for stop, begin in begins if (place := text.find(stop, begin)) >= 0]
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
