"""OpenAI's text completions on the served model: what it writes after a text, or after tokens, without a chat."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.answers import Answers, StreamOptions
from twinloop.serving.chat import MAX_STOP_STRINGS, StopText, describe_others, refuse_unserved
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.described import ASK_WORDS, ASKING, Usage, errors
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.errors import ApiError
from twinloop.serving.generation import TextStream, interleaved
from twinloop.serving.metrics import COMPLETIONS
from twinloop.serving.model_manager import ModelManager

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

EXAMPLE = {"prompt": "Once upon a time", "max_tokens": 16}

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(BaseModel):
    """The part of OpenAI's request that is served. Temperature 0 is greedy.

    prompt: one or several, each a text, in which nothing is a special token, or token ids, which may be any.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, json_schema_extra=describe_others)

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    model: str | None = None
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=1)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    echo: bool | None = False
    add_special_tokens: bool = Field(True, description="whether a text begins as the model's texts do, with BOS")

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first, *_ = self.prompt
        return [self.prompt] if isinstance(first, int) else self.prompt  # type: ignore[list-item,return-value]

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """OpenAI's, of a request without `stream`. There is a choice a prompt, in their order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": TextCompletion,
        "description": "The completion; with `stream`, server-sent events of OpenAI's chunks",
        "content": {"text/event-stream": {"schema": {}}},
    },
    **errors(404, *ASKING, words=ASK_WORDS),
}


class Completion:
    """One accepted request, and the objects that OpenAI's clients expect of it."""

    def __init__(self, texts: Sequence[TextStream], echoed: Sequence[str], model: ModelInfo):
        """echoed: what is shown before each text."""
        self.texts = texts
        self._echoed = echoed
        self._model = model
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def usage(self) -> Usage:
        prompt = sum(text.prompt_tokens for text in self.texts)
        completion = sum(text.completion_tokens for text in self.texts)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _object(self, choices: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.digest,
            "choices": choices,
        }

    def whole(self) -> TextCompletion:
        """Wait for all texts and return the completion object."""
        choices = [
            TextChoice(index=index, text=echo + "".join(text), logprobs=None, finish_reason=text.finish_reason)
            for index, (echo, text) in enumerate(zip(self._echoed, self.texts, strict=True))
        ]
        return TextCompletion(**self._object(choices), usage=self.usage())

    def chunks(self, *, include_usage: bool) -> Iterator[dict[str, Any]]:
        """The same texts as chunk objects, each as soon as it is there, whichever prompt it belongs to."""
        no_usage = {"usage": None} if include_usage else {}

        def chunk(index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
            return self._object([choice]) | no_usage

        for index, echo in enumerate(self._echoed):
            if echo:
                yield chunk(index, echo)
        for index, piece in interleaved(self.texts):
            yield chunk(index, "", self.texts[index].finish_reason) if piece is None else chunk(index, piece)
        if include_usage:
            yield self._object([]) | {"usage": self.usage().model_dump()}


def completions_router(manager: ModelManager, answers: Answers) -> APIRouter:
    """`POST /v1/completions`."""
    router = APIRouter()

    @router.post(COMPLETIONS, response_model=None, responses=RESPONSES)
    async def complete(request: Request, body: Annotated[CompletionRequest, Body(examples=[EXAMPLE])]) -> Response:
        started = time.perf_counter()
        completion = await anyio.to_thread.run_sync(manager.submit, lambda service: _submit(service, body, started))
        return await answers.respond(request, completion, started, body.stream, body.stream_options)

    return router


def _submit(service: DecisionService, body: CompletionRequest, started: float) -> Completion:
    """Queue every prompt. Raises ApiError for what cannot be served, QueueFullError where not all have a place."""
    refuse_unserved(body.model, body.model_extra, service)
    scheduler, tokenizer = service.scheduler, service.tokenizer
    if len(body.prompts) > scheduler.capacity:
        raise ApiError(
            400, f"prompt: at most {scheduler.capacity} are answered at a time", code="too_many_prompts", param="prompt"
        )
    with ExitStack() as stack:
        # All or none: a request that must be refused costs no more than this.
        places = [stack.enter_context(scheduler.reserve()) for _ in body.prompts]
        prompts = [_encode(prompt, tokenizer, body.add_special_tokens) for prompt in body.prompts]
        params = [_params(prompt, body, service) for prompt in prompts]
        texts: list[TextStream] = []
        for place, prompt, sampling in zip(places, prompts, params, strict=True):
            stream = place.submit(prompt, sampling)
            texts.append(TextStream(stream, tokenizer, started=started, stop=body.stop_texts))
            stack.callback(stream.cancel)  # where a later prompt is not taken
        stack.pop_all()  # each place has its prompt
    echoed = [_shown(prompt, tokenizer) if body.echo else "" for prompt in body.prompts]
    return Completion(texts, echoed, service.model)


def _encode(prompt: str | list[int], tokenizer: ChatTokenizer, add_special_tokens: bool) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode_text(prompt) if add_special_tokens else tokenizer.encode(prompt)
        if not ids:
            raise ApiError(400, "prompt: has no tokens", code="empty_prompt", param="prompt")
        return ids
    refuse_unknown_ids(prompt, tokenizer, "prompt")
    return prompt


def refuse_unknown_ids(ids: Sequence[int], tokenizer: ChatTokenizer, param: str) -> None:
    """Raises ApiError for an id that is no token's."""
    size = tokenizer.vocab_size
    if unknown := next((id for id in ids if id >= size), None):
        problem = f"{param}: {unknown} is not a token id; the model has {size} tokens"
        raise ApiError(400, problem, code="unknown_token", param=param)


def _shown(prompt: str | list[int], tokenizer: ChatTokenizer) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode_all(prompt)


def _params(prompt: Sequence[int], body: CompletionRequest, service: DecisionService) -> SamplingParams:
    longest, wanted = service.scheduler.max_length, body.max_tokens or DEFAULT_MAX_TOKENS
    if longest - len(prompt) < wanted:
        raise ApiError(
            400,
            f"the model reads and writes at most {longest} tokens; the prompt has {len(prompt)} and {wanted} were "
            "asked for",
            code="context_length_exceeded",
            param="prompt",
        )
    return SamplingParams(
        max_tokens=wanted,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=service.tokenizer.stop_ids,
    )
