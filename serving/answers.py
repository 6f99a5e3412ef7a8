"""How an accepted request to a model is answered over HTTP: whole, or streamed as server-sent events, in the objects
that OpenAI's clients expect."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from twinloop.serving.asked import Asked, UsageInStream
from twinloop.serving.decisions import DecisionService
from twinloop.serving.described import PromptTokensDetails, Usage
from twinloop.serving.engine.sampling import ConstraintError
from twinloop.serving.errors import constraint_body, error_body
from twinloop.serving.generation import TextStream
from twinloop.serving.key_access import account_of
from twinloop.serving.metrics import Metrics
from twinloop.serving.work import Workers

log = logging.getLogger(__name__)


class Answer(Protocol):
    """One of the choices. Read it once: by `whole`, or by `deltas`."""

    @property
    def text(self) -> TextStream:
        """What the model writes for it."""

    def whole(self) -> BaseModel:
        """Wait for all of it. Returns the choice of a completion."""

    def deltas(self) -> Iterator[dict[str, Any]]:
        """The same as the choices of chunks, each as soon as its text is there."""


class Form(NamedTuple):
    """Of a route's completions. kind: the name under which they are counted; id: how their ids begin."""

    kind: str
    id: str
    whole: type[BaseModel]
    whole_object: str
    chunk_object: str


class Completion:
    """All answers of one accepted request."""

    def __init__(self, answers: Sequence[Answer], service: DecisionService, form: Form):
        """service: what answers."""
        self.answers = answers
        self.form = form
        self._model, self._digest = service.id, service.model.digest
        self._id = f"{form.id}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    @property
    def texts(self) -> list[TextStream]:
        """What the model writes for it."""
        return [answer.text for answer in self.answers]

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token of any answer, once they are read."""
        return min((text.ttft_s for text in self.texts if text.ttft_s is not None), default=None)

    def cancel(self) -> None:
        """Free the slots; may be called from any thread, and again."""
        for text in self.texts:
            text.cancel()

    def whole(self, choices: Sequence[BaseModel]) -> BaseModel:
        """The completion object, of all answers' `whole`."""
        return self.form.whole(**self._object(self.form.whole_object, choices), usage=usage_of(self.texts))

    def chunks(self, usage: UsageInStream) -> list[Iterator[dict[str, Any]]]:
        """The chunk objects of each answer; after them, unless there is to be no usage, comes `usage_chunk`."""

        def chunks_of(answer: Answer) -> Iterator[dict[str, Any]]:
            for delta in answer.deltas():
                chunk = self._object(self.form.chunk_object, [delta])
                if usage != "none":
                    chunk["usage"] = usage_of(self.texts).model_dump() if usage == "each" else None
                yield chunk

        return [chunks_of(answer) for answer in self.answers]

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, once all answers are read."""
        return self._object(self.form.chunk_object, []) | {"usage": usage_of(self.texts).model_dump()}

    def _object(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._digest,
            "choices": choices,
        }


class Answers:
    """The end of every route whose answer is the model's text."""

    def __init__(self, metrics: Metrics, workers: Workers):
        self._metrics = metrics
        self.workers = workers

    async def respond(self, request: Request, asked: Asked, completion: Completion, started: float) -> Response:
        """started: the `time.perf_counter()` at which the request arrived. The client that leaves frees the slots."""

        def end() -> None:
            completion.cancel()
            self._metrics.ended(completion.texts)
            charge(request, completion.texts)

        if asked.stream:
            return _EventStream(self._events(completion, started, asked.usage_in_stream), end)
        works = [answer.whole for answer in completion.answers]
        try:
            choices = await self.workers.run_unless_gone(request, completion.cancel, *works)
        finally:
            end()
        self._observe(completion, started)
        whole = completion.whole(choices)
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")

    def _observe(self, completion: Completion, started: float) -> None:
        self._metrics.answered(completion.form.kind, time.perf_counter() - started, completion.ttft_s)

    async def _events(self, completion: Completion, started: float, usage: UsageInStream) -> AsyncIterator[str]:
        try:
            async for chunk in self.workers.merge(completion.chunks(usage)):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            if usage != "none":
                yield f"data: {json.dumps(completion.usage_chunk(), ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
            self._observe(completion, started)
        except ConstraintError as error:
            yield f"data: {json.dumps(constraint_body(error))}\n\n"
        except Exception as error:
            log.exception("a stream ends before its answer does")
            body = error_body(500, f"the model could not go on ({type(error).__name__})")
            yield f"data: {json.dumps(body)}\n\n"


def charge(request: Request, texts: Sequence[TextStream]) -> None:
    """Take the tokens of a request, read and written, from its key's limit."""
    if (account := account_of(request)) is not None:
        account.charge(usage_of(texts).total_tokens)


def usage_of(texts: Sequence[TextStream]) -> Usage:
    """The tokens of a request, so far: those of its texts, and of their prompts."""
    prompts = {text.prompt for text in texts}  # several texts may be of one
    prompt = sum(len(each.tokens) for each in prompts)
    completion = sum(text.completion_tokens for text in texts)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(each.cached_tokens or 0 for each in prompts)),
    )


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
