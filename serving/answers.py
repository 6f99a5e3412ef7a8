"""How an accepted request to a model is answered over HTTP: whole, or streamed as server-sent events."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.types import Receive, Scope, Send

from twinloop.serving.engine.sampling import ConstraintError
from twinloop.serving.errors import constraint_body, error_body
from twinloop.serving.generation import TextStream
from twinloop.serving.key_access import account_of
from twinloop.serving.metrics import Metrics
from twinloop.serving.work import Workers

log = logging.getLogger(__name__)


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = False


class Answer(Protocol):
    """One accepted request, in the objects that its route answers with."""

    @property
    def texts(self) -> Sequence[TextStream]:
        """What the model writes for it."""

    def whole(self) -> BaseModel:
        """Wait for all of it."""

    def chunks(self, *, include_usage: bool) -> Iterator[dict[str, Any]]:
        """The same piece by piece, each as soon as its text is there."""


class Answers:
    """The end of every route whose answer is the model's text. kind: the name under which its answers are counted."""

    def __init__(self, metrics: Metrics, workers: Workers, kind: str):
        self._metrics = metrics
        self._workers = workers
        self._kind = kind

    async def respond(
        self, request: Request, answer: Answer, started: float, stream: bool | None, options: StreamOptions | None
    ) -> Response:
        """started: the `time.perf_counter()` at which the request arrived. The client that leaves frees the slots."""

        def cancel() -> None:
            for text in answer.texts:
                text.cancel()

        def end() -> None:
            cancel()
            self._metrics.ended(answer.texts)
            charge(request, answer.texts)

        if stream:
            include_usage = options is not None and options.include_usage
            return _EventStream(self._events(answer, started, include_usage), end)
        try:
            whole = await self._workers.run_unless_gone(request, answer.whole, cancel)
        finally:
            end()
        self._observe(answer, started)
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")

    def _observe(self, answer: Answer, started: float) -> None:
        first = min((text.ttft_s for text in answer.texts if text.ttft_s is not None), default=None)
        self._metrics.answered(self._kind, time.perf_counter() - started, first)

    async def _events(self, answer: Answer, started: float, include_usage: bool) -> AsyncIterator[str]:
        chunks = answer.chunks(include_usage=include_usage)
        try:
            while (chunk := await self._workers.run(next, chunks, None)) is not None:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
            self._observe(answer, started)
        except ConstraintError as error:
            yield f"data: {json.dumps(constraint_body(error))}\n\n"
        except Exception as error:
            log.exception("a stream ends before its answer does")
            body = error_body(500, f"the model could not go on ({type(error).__name__})")
            yield f"data: {json.dumps(body)}\n\n"


def charge(request: Request, texts: Sequence[TextStream]) -> None:
    """Take the tokens of a request, read and written, from its key's limit."""
    if (account := account_of(request)) is not None:
        account.charge(sum(text.prompt_tokens + text.completion_tokens for text in texts))


class _EventStream(StreamingResponse):
    """Server-sent events. `end` is called in the end, also where the client has left before the first of them."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()
