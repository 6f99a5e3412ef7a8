"""OpenAI's chat completions on the served model: whole, or streamed as server-sent events.

A parameter that would have to be ignored is refused by its name.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from twinloop.common.errors import UserError
from twinloop.domains.domain import MAX_MESSAGES, Domain
from twinloop.domains.examples import GREETING
from twinloop.serving.chat_answer import Answer, Completion
from twinloop.serving.decisions import DecisionService
from twinloop.serving.described import CHAT_RESPONSES
from twinloop.serving.engine.sampling import ConstraintError
from twinloop.serving.engine.scheduler import Place
from twinloop.serving.errors import METHODS, ApiError, constraint_body, error_body
from twinloop.serving.generation import TextStream
from twinloop.serving.health import refuse_other_model, routes_of
from twinloop.serving.messages import ChatMessage, encode_messages
from twinloop.serving.metrics import CHAT, Metrics
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.response_format import constraint_of
from twinloop.serving.sampling_fields import SamplingFields
from twinloop.serving.tools import FormFields, tool_use
from twinloop.serving.work import Workers

log = logging.getLogger(__name__)

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Parameters that do not concern the answer."""

EXAMPLE = {"messages": GREETING, "max_tokens": 16}


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = False


def _describe_others(schema: dict[str, Any]) -> None:
    """Add the parameters that are not fields, since they change nothing, to the schema of a request."""
    schema["properties"] |= {name: {"description": "accepted, and without effect"} for name in sorted(IGNORED)}
    schema["additionalProperties"] = False


class ChatRequest(FormFields, SamplingFields):
    """The part of OpenAI's request that is served, and vLLM's further parameters of sampling."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, json_schema_extra=_describe_others)

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class _EventStream(StreamingResponse):
    """Server-sent events. `cancel` is called in the end, also where the client has left before the first of them."""

    def __init__(self, events: AsyncIterator[str], cancel: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()


def chat_router(manager: ModelManager, metrics: Metrics, workers: Workers) -> APIRouter:
    """`POST /v1/chat/completions`."""
    router = APIRouter()

    def observe(completion: Completion, started: float) -> None:
        metrics.answered("chat", time.perf_counter() - started, completion.ttft_s)

    async def events(completion: Completion, include_usage: bool, started: float) -> AsyncIterator[str]:
        try:
            async for chunk in workers.merge(completion.chunks(include_usage=include_usage)):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            if include_usage:
                yield f"data: {json.dumps(completion.usage_chunk(), ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
            observe(completion, started)
        except ConstraintError as error:
            yield f"data: {json.dumps(constraint_body(error))}\n\n"
        except Exception as error:
            log.exception("a stream ends before its answer does")
            body = error_body(500, f"the model could not go on ({type(error).__name__})")
            yield f"data: {json.dumps(body)}\n\n"

    @router.post(CHAT, response_model=None, responses=CHAT_RESPONSES)
    async def complete(request: Request, body: Annotated[ChatRequest, Body(examples=[EXAMPLE])]) -> Response:
        started = time.perf_counter()
        completion = await anyio.to_thread.run_sync(manager.submit, lambda service: _submit(service, body, started))
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return _EventStream(events(completion, include_usage, started), completion.cancel)
        works = [answer.whole for answer in completion.answers]
        choices = await workers.run_unless_gone(request, completion.cancel, *works)
        observe(completion, started)
        whole = completion.whole(choices)
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")

    return router


def _submit(service: DecisionService, body: ChatRequest, started: float) -> Completion:
    """Queue a request. Raises ApiError for what cannot be served, QueueFullError when the queue is full."""
    _refuse_unserved(body, service)
    with service.scheduler.reserve(body.choices) as place:  # a request that must be refused costs no more than this
        return _submit_in(place, service, body, started)


def _submit_in(place: Place, service: DecisionService, body: ChatRequest, started: float) -> Completion:
    grammars = service.grammars
    use = tool_use(body, service.tool_support, grammars)
    constraint = constraint_of(body.response_format, grammars) if use is None else use.constraint
    tokenizer, longest = service.tokenizer, service.scheduler.max_length
    try:
        prompt = encode_messages(body.messages, tokenizer, () if use is None else use.prompt_tools)
    except UserError as error:  # the chat template does not take these messages
        raise ApiError(400, str(error), param="messages") from None
    available, wanted = longest - len(prompt), body.most_tokens
    if available < (wanted or 1):
        raise ApiError(
            400,
            f"the model reads and writes at most {longest} tokens; the messages have {len(prompt)}"
            + (f" and {wanted} were asked for" if wanted else ""),
            code="context_length_exceeded",
            param="messages",
        )
    params = body.sampling_params(
        max_tokens=available, stop=tokenizer.stop_ids, constraint=constraint, vocab_size=tokenizer.vocab_size
    )
    answers = [
        Answer(
            index,
            TextStream(
                stream,
                tokenizer,
                started=started,
                stop=body.stop_texts,
                calls=use.form.trigger if use is not None and use.may_call else None,
                min_tokens=params.min_tokens,
                ignore_eos=bool(body.ignore_eos),
                reported=bool(body.logprobs),
            ),
            use,
            tokenizer if body.logprobs else None,
        )
        for index, stream in enumerate(place.submit(prompt, params))
    ]
    return Completion(answers, len(prompt), service.model)


def closed_route(path: str, domain: Domain) -> APIRouter:
    """In the place of what the domain does not serve: a 404 that names where its model is asked."""
    router = APIRouter()
    there = " and ".join(f"POST {route}" for route in routes_of(domain)) or "nothing"

    @router.api_route(path, methods=[*METHODS], include_in_schema=False)
    def closed() -> None:
        raise ApiError(404, f"{path}: not served, since the model's domain is {domain.name}; it answers {there}")

    return router


def _refuse_unserved(body: ChatRequest, service: DecisionService) -> None:
    if body.model is not None:
        refuse_other_model(body.model, service.model)
    for name, value in (body.model_extra or {}).items():
        if name not in IGNORED and value is not None:
            raise ApiError(400, f"{name}: is not a known parameter", code="unsupported_parameter", param=name)
    if body.choices > (capacity := service.scheduler.capacity):
        problem = f"n: this server works on {capacity} answers at once, at most"
        raise ApiError(400, problem, code="unsupported_parameter", param="n")
