"""OpenAI's chat completions on the served model: whole, or streamed as server-sent events.

What a small greedy-or-sampled engine can do is accepted; a parameter that it would have to ignore is refused by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Body, Request, Response
from pydantic import ConfigDict, Field

from twinloop.common.errors import UserError
from twinloop.domains.domain import MAX_MESSAGES, Domain
from twinloop.domains.examples import GREETING
from twinloop.serving.answers import Answers, StreamOptions
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.described import (
    CHAT_RESPONSES,
    AnsweredCall,
    AnsweredFunction,
    AnswerMessage,
    ChatCompletion,
    Choice,
    PromptTokensDetails,
    Usage,
)
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Place
from twinloop.serving.errors import METHODS, ApiError
from twinloop.serving.generation import TextStream
from twinloop.serving.health import refuse_other_model, routes_of
from twinloop.serving.messages import ChatMessage, encode_messages
from twinloop.serving.metrics import CHAT
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.response_format import constraint_of
from twinloop.serving.tool_calls import ArgumentsPiece, CallStart, Piece, read_calls
from twinloop.serving.tools import FormFields, ToolUse, tool_use

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 100

NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "logit_bias": {}, "n": 1,
}  # fmt: skip
"""Parameters that are accepted only with the value that changes nothing (or null)."""

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Parameters that do not concern the answer."""


EXAMPLE = {"messages": GREETING, "max_tokens": 16}

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


def describe_others(schema: dict[str, Any]) -> None:
    """Add the parameters that are not fields, since they change nothing, to the schema of a request."""
    schema["properties"] |= {name: {"enum": [value, None]} for name, value in NEUTRAL.items()}
    schema["properties"] |= {name: {"description": "accepted, and without effect"} for name in sorted(IGNORED)}
    schema["additionalProperties"] = False


class ChatRequest(FormFields):
    """The part of OpenAI's request that is served. Temperature 0 is greedy."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, json_schema_extra=describe_others)

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion:
    """One accepted request, and the objects that OpenAI's clients expect of it."""

    def __init__(self, text: TextStream, prompt_tokens: int, model: ModelInfo, use: ToolUse | None):
        self.text = text
        self._use = use if use is not None and use.may_call else None
        self._prompt_tokens = prompt_tokens
        self._model = model
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    @property
    def texts(self) -> tuple[TextStream, ...]:
        return (self.text,)

    def usage(self) -> Usage:
        completion = self.text.completion_tokens
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion,
            total_tokens=self._prompt_tokens + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.text.cached_tokens),
        )

    def _object(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.digest,
            "choices": choices,
        }

    def whole(self) -> ChatCompletion:
        """Wait for the answer and return the completion object."""
        content, calls = "", list[AnsweredCall]()
        for piece in self._pieces():
            if isinstance(piece, str):
                content += piece
            elif isinstance(piece, CallStart):
                function = AnsweredFunction(name=piece.name, arguments="")
                calls.append(AnsweredCall(id=piece.id, type="function", function=function))
            else:
                calls[piece.index].function.arguments += piece.text
        called = {"tool_calls": calls} if calls else {}  # an answer of text has no such field
        message = AnswerMessage(role="assistant", content=content or (None if calls else ""), refusal=None, **called)
        choice = Choice(index=0, message=message, logprobs=None, finish_reason=self._finish_reason(bool(calls)))
        return ChatCompletion(**self._object("chat.completion", [choice]), usage=self.usage())

    def _pieces(self) -> Iterator[Piece]:
        return iter(self.text) if self._use is None else read_calls(self.text, self._use)

    def _finish_reason(self, called: bool) -> Literal["stop", "length", "tool_calls"]:
        reason = self.text.finish_reason
        return "tool_calls" if called and reason == "stop" else reason

    def chunks(self, *, include_usage: bool) -> Iterator[dict[str, Any]]:
        """The same answer as chunk objects, each as soon as its text is there."""
        no_usage = {"usage": None} if include_usage else {}

        def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return self._object("chat.completion.chunk", [choice]) | no_usage

        called = False
        yield chunk({"role": "assistant", "content": "" if self._use is None else None})
        for piece in self._pieces():
            called = called or not isinstance(piece, str)
            yield chunk({"content": piece} if isinstance(piece, str) else {"tool_calls": [_call_delta(piece)]})
        yield chunk({}, self._finish_reason(called))
        if include_usage:
            yield self._object("chat.completion.chunk", []) | {"usage": self.usage().model_dump()}


def _call_delta(piece: CallStart | ArgumentsPiece) -> dict[str, Any]:
    if isinstance(piece, ArgumentsPiece):
        return {"index": piece.index, "function": {"arguments": piece.text}}
    function = {"name": piece.name, "arguments": ""}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def chat_router(manager: ModelManager, answers: Answers) -> APIRouter:
    """`POST /v1/chat/completions`."""
    router = APIRouter()

    @router.post(CHAT, response_model=None, responses=CHAT_RESPONSES)
    async def complete(request: Request, body: Annotated[ChatRequest, Body(examples=[EXAMPLE])]) -> Response:
        started = time.perf_counter()
        completion = await anyio.to_thread.run_sync(manager.submit, lambda service: _submit(service, body, started))
        return await answers.respond(request, completion, started, body.stream, body.stream_options)

    return router


def _submit(service: DecisionService, body: ChatRequest, started: float) -> Completion:
    """Queue a request. Raises ApiError for what cannot be served, QueueFullError when the queue is full."""
    refuse_unserved(body.model, body.model_extra, service)
    with service.scheduler.reserve() as place:  # a request that must be refused costs no more than this
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
    available = longest - len(prompt)
    wanted = body.max_completion_tokens or body.max_tokens
    if available < (wanted or 1):
        raise ApiError(
            400,
            f"the model reads and writes at most {longest} tokens; the messages have {len(prompt)}"
            + (f" and {wanted} were asked for" if wanted else ""),
            code="context_length_exceeded",
            param="messages",
        )
    params = SamplingParams(
        max_tokens=wanted or available,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=tokenizer.stop_ids,
        constraint=constraint,
    )
    stream = place.submit(prompt, params)
    calls = use.form.trigger if use is not None and use.may_call else None
    text = TextStream(stream, tokenizer, started=started, stop=body.stop_texts, calls=calls)
    return Completion(text, len(prompt), service.model, use)


def closed_route(path: str, domain: Domain) -> APIRouter:
    """In the place of what the domain does not serve: a 404 that names where its model is asked."""
    router = APIRouter()
    there = " and ".join(f"POST {route}" for route in routes_of(domain)) or "nothing"

    @router.api_route(path, methods=[*METHODS], include_in_schema=False)
    def closed() -> None:
        raise ApiError(404, f"{path}: not served, since the model's domain is {domain.name}; it answers {there}")

    return router


def refuse_unserved(model: str | None, extra: Mapping[str, Any] | None, service: DecisionService) -> None:
    """Raises ApiError for another model, and for parameters beside a request's own fields that cannot be served."""
    if model is not None:
        refuse_other_model(model, service.model)
    for name, problem in _unserved(extra or {}):
        raise ApiError(400, f"{name}: {problem}", code="unsupported_parameter", param=name)


def _unserved(extra: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters that cannot be served, and why."""
    for name, value in extra.items():
        if name in IGNORED or value is None or (name in NEUTRAL and _same(value, NEUTRAL[name])):
            continue
        yield name, f"only {json.dumps(NEUTRAL[name])} is served" if name in NEUTRAL else "is not a known parameter"


def _same(value: Any, other: Any) -> bool:
    """As JSON, which knows true from 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
