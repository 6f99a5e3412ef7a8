"""OpenAI's text completions on the served model: what it writes after a text, or after tokens, without a chat."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, Field

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.answers import Answers, Completion, Form
from twinloop.serving.asked import Asked, refuse_too_long, refuse_unserved
from twinloop.serving.decisions import DecisionService
from twinloop.serving.described import ASK_WORDS, ASKING, Usage, errors
from twinloop.serving.engine.sampling import MAX_TOP_LOGPROBS, Constraint, SamplingParams
from twinloop.serving.errors import ApiError
from twinloop.serving.generation import TextStream
from twinloop.serving.metrics import COMPLETIONS
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.response_format import TextFormFields, constraint_of
from twinloop.serving.sampling_fields import refused
from twinloop.serving.text_logprobs import PlacedToken, TextLogprobs, prompt_tokens, text_logprobs

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

EXAMPLE = {"prompt": "Once upon a time", "max_tokens": 16}

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(TextFormFields, Asked):
    """The part of OpenAI's request that is served, and vLLM's further parameters of sampling.

    prompt: one or several, each a text, in which nothing is a special token, or token ids, which may be any.
    """

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=0, description="0, with `echo`: the prompt alone")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="of so many of the likeliest tokens")
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
    def reported(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alone(self) -> bool:
        """Whether no answer is asked for. Raises ApiError where that leaves nothing to show."""
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "0 is for a prompt that is shown with echo; ask for at least 1")
        if self.max_tokens == 0 and self.min_tokens:
            raise refused("min_tokens", "the answer may have 0 tokens at most")
        return self.max_tokens == 0


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """OpenAI's, of a request without `stream`. There are `n` choices a prompt, in the order of the prompts."""

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

FORM = Form("completions", "cmpl", TextCompletion, "text_completion", "text_completion")


class TextAnswer:
    """One of the choices, see `answers.Answer`."""

    def __init__(self, index: int, text: TextStream, echoed: str | None, reports_of: ChatTokenizer | None):
        """echoed: the prompt, where it is shown before the text. reports_of: as `ChatAnswer` has it."""
        self.text = text
        self._index = index
        self._echoed = echoed
        self._tokenizer = reports_of
        self._prompt_is_due = echoed is not None

    def whole(self) -> TextChoice:
        """Wait for the text."""
        self.text.wait()
        text = (self._echoed or "") + "".join(self.text)
        finish_reason = self.text.finish_reason
        return TextChoice(index=self._index, text=text, logprobs=self._logprobs(), finish_reason=finish_reason)

    def deltas(self) -> Iterator[dict[str, Any]]:
        """The same as the choices of chunks, each as soon as its text is there."""
        shown = self._echoed or ""
        if shown and self._tokenizer is None:  # else what is said of its tokens is known with the first of the answer
            yield self._delta(shown)
            shown = ""
        for piece in self.text:
            yield self._delta(shown + piece)
            shown = ""
        yield self._delta(shown, self.text.finish_reason)

    def _delta(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = self._logprobs(always=False)
        return {
            "index": self._index,
            "text": text,
            "logprobs": None if logprobs is None else logprobs.model_dump(),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, *, always: bool = True) -> TextLogprobs | None:
        """Of the tokens read since the last call, where they are asked for. always: also where there are none."""
        if self._tokenizer is None:
            return None
        before = len(self._echoed or "")
        tokens = [PlacedToken(each.id, before + each.begin, each.report) for each in self.text.take_reported()]
        if self._prompt_is_due:
            tokens = [*prompt_tokens(self.text.prompt, self._echoed or "", self._tokenizer), *tokens]
            self._prompt_is_due = False
        return text_logprobs(tokens, self._tokenizer) if tokens or always else None


def completions_router(manager: ModelManager, answers: Answers) -> APIRouter:
    """`POST /v1/completions`."""
    router = APIRouter()

    @router.post(COMPLETIONS, response_model=None, responses=RESPONSES)
    async def complete(request: Request, body: Annotated[CompletionRequest, Body(examples=[EXAMPLE])]) -> Response:
        started = time.perf_counter()
        work = partial(_submit, body=body, started=started)
        completion = await answers.workers.submit(manager, work, body.model)
        return await answers.respond(request, body, completion, started)

    return router


def _submit(service: DecisionService, body: CompletionRequest, started: float) -> Completion:
    """Queue every prompt. Raises ApiError for what cannot be served, QueueFullError where not all have a place."""
    refuse_unserved(body, service, prompts=len(body.prompts))
    tokenizer = service.tokenizer
    reports_of = None if body.logprobs is None else tokenizer
    answers: list[TextAnswer] = []
    with ExitStack() as stack:
        # All or none: a request that must be refused costs no more than this.
        places = [stack.enter_context(service.reserve(body.choices)) for _ in body.prompts]
        constraint = constraint_of(body, service.grammars)
        prompts = [_encode(prompt, tokenizer, body.add_special_tokens) for prompt in body.prompts]
        params = [_params(prompt, body, service, constraint) for prompt in prompts]
        for asked, place, prompt, sampling in zip(body.prompts, places, prompts, params, strict=True):
            echoed = _shown(asked, tokenizer) if body.echo else None
            of_prompt = body.logprobs if body.echo else None
            for stream in place.submit(prompt, sampling, priority=body.priority, prompt_logprobs=of_prompt):
                stack.callback(stream.cancel)  # where a later prompt is not taken
                text = TextStream(
                    stream,
                    tokenizer,
                    started=started,
                    stop=body.stop_texts,
                    silent=body.prompt_alone,
                    reports_end=True,
                    continues=bool(asked),
                    form=body.form_param,
                )
                answers.append(TextAnswer(len(answers), text, echoed, reports_of))
        stack.pop_all()  # each place has its prompt
    return Completion(answers, service, FORM)


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


def _params(
    prompt: Sequence[int], body: CompletionRequest, service: DecisionService, constraint: Constraint | None
) -> SamplingParams:
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    refuse_too_long(len(prompt), wanted, service.scheduler.max_length, param="prompt")
    # The engine draws a token wherever it has read a prompt, which costs no pass; the prompt alone is shown without it.
    return body.sampling_params(
        max_tokens=1 if body.prompt_alone else wanted,
        stop=service.tokenizer.stop_ids,
        constraint=constraint,
        vocab_size=service.tokenizer.vocab_size,
    )
