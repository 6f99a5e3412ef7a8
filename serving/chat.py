"""OpenAI's chat completions on the served model: whole, or streamed as server-sent events."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field

from twinloop.common.errors import UserError
from twinloop.domains.domain import MAX_MESSAGES
from twinloop.domains.examples import GREETING
from twinloop.serving.answers import Answers, Completion
from twinloop.serving.asked import Asked, refuse_too_long, refuse_unserved
from twinloop.serving.chat_answer import FORM, ChatAnswer
from twinloop.serving.decisions import DecisionService
from twinloop.serving.described import CHAT_RESPONSES
from twinloop.serving.engine.sampling import MAX_TOP_LOGPROBS
from twinloop.serving.engine.scheduler import Place
from twinloop.serving.errors import ApiError
from twinloop.serving.generation import TextStream
from twinloop.serving.messages import ChatMessage, encode_messages
from twinloop.serving.metrics import CHAT
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.response_format import constraint_of
from twinloop.serving.sampling_fields import refused
from twinloop.serving.tools import FormFields, tool_use

EXAMPLE = {"messages": GREETING, "max_tokens": 16}


class ChatRequest(FormFields, Asked):
    """The part of OpenAI's request that is served, and vLLM's further parameters of sampling."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def reported(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "logprobs must be true with it")
        return (self.top_logprobs or 0) if self.logprobs else None


def chat_router(manager: ModelManager, answers: Answers) -> APIRouter:
    """`POST /v1/chat/completions`."""
    router = APIRouter()

    @router.post(CHAT, response_model=None, responses=CHAT_RESPONSES)
    async def complete(request: Request, body: Annotated[ChatRequest, Body(examples=[EXAMPLE])]) -> Response:
        started = time.perf_counter()
        work = partial(_submit, body=body, started=started)
        completion = await answers.workers.submit(manager, work, body.model)
        return await answers.respond(request, body, completion, started)

    return router


def _submit(service: DecisionService, body: ChatRequest, started: float) -> Completion:
    """Queue a request. Raises ApiError for what cannot be served, QueueFullError when the queue is full."""
    refuse_unserved(body, service)
    with service.reserve(body.choices) as place:  # a request that must be refused costs no more than this
        return _submit_in(place, service, body, started)


def _submit_in(place: Place, service: DecisionService, body: ChatRequest, started: float) -> Completion:
    grammars = service.grammars
    use = tool_use(body, service.tool_support, grammars)
    constraint = constraint_of(body, grammars) if use is None else use.constraint
    tokenizer, longest = service.tokenizer, service.scheduler.max_length
    try:
        prompt = encode_messages(body.messages, tokenizer, () if use is None else use.prompt_tools)
    except UserError as error:  # the chat template does not take these messages
        raise ApiError(400, str(error), param="messages") from None
    refuse_too_long(len(prompt), body.most_tokens, longest, param="messages")
    params = body.sampling_params(
        max_tokens=longest - len(prompt),
        stop=tokenizer.stop_ids,
        constraint=constraint,
        vocab_size=tokenizer.vocab_size,
    )
    calls = use.form.trigger if use is not None and use.may_call else None
    form = body.form_param if use is None else use.text_param
    answers = [
        ChatAnswer(
            index,
            TextStream(stream, tokenizer, started=started, stop=body.stop_texts, calls=calls, form=form),
            use,
            tokenizer if body.logprobs else None,
        )
        for index, stream in enumerate(place.submit(prompt, params, priority=body.priority))
    ]
    return Completion(answers, service, FORM)
