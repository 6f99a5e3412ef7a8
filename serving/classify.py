"""`POST /v1/classify` on a model with a head: labels with probabilities, or the scores of a reward model."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twinloop.common.errors import UserError
from twinloop.domains.domain import MAX_MESSAGES, explained
from twinloop.serving.answers import charge, usage_of
from twinloop.serving.asked import ModelName, Priority, refuse_too_long
from twinloop.serving.decisions import DecisionService
from twinloop.serving.described import ASK_WORDS, ASKING, Usage, errors
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.errors import ApiError
from twinloop.serving.generation import TextStream
from twinloop.serving.health import refuse_closed
from twinloop.serving.messages import ChatMessage, encode_answered, encode_messages
from twinloop.serving.metrics import CLASSIFY, Metrics
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.work import Workers

EXAMPLE = {"input": "my parcel has not arrived"}

Conversation = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class ClassifyRequest(BaseModel):
    """input: one or several. For a classifier a text, of which the server makes the prompt that the model was trained
    with, or the messages of a prompt. For a reward model the messages of a conversation, the assistant's answer last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: ModelName | None = None
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Conversation
        | Annotated[list[Conversation], Field(min_length=1)]
    )
    priority: Priority = 0

    @property
    def inputs(self) -> Sequence[str | Sequence[ChatMessage]]:
        """Each input by itself."""
        if isinstance(self.input, str):
            return [self.input]
        first, *_ = self.input
        return self.input if isinstance(first, (str, list)) else [self.input]  # type: ignore[return-value,list-item]


class Classified(BaseModel):
    """probabilities: of every label, the likeliest first."""

    index: int
    label: str
    probability: float
    probabilities: dict[str, float]


class Scored(BaseModel):
    """score: of the answer; only differences between answers to one prompt mean something."""

    index: int
    score: float


class Classification(BaseModel):
    """In the order of the inputs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str
    data: list[Classified | Scored]
    usage: Usage


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Classification},
    **errors(404, *ASKING, words=ASK_WORDS),
}


def classify_router(manager: ModelManager, metrics: Metrics, workers: Workers) -> APIRouter:
    """`POST /v1/classify`. A model that writes text answers 404."""
    router = APIRouter()

    @router.post(CLASSIFY, response_model=None, responses=RESPONSES)
    async def classify(request: Request, body: Annotated[ClassifyRequest, Body(examples=[EXAMPLE])]) -> Response:
        started = time.perf_counter()
        work = partial(_Pending, body=body, started=started)
        pending = await workers.submit(manager, work, body.model)
        try:
            await workers.run_unless_gone(request, pending.cancel, pending.finish)
        finally:
            pending.cancel()
            metrics.ended(pending.texts)
            charge(request, pending.texts)
        metrics.answered("classify", time.perf_counter() - started, pending.texts[0].ttft_s)
        return Response(pending.response().model_dump_json(), media_type="application/json")

    return router


class _Pending:
    """Inputs that wait in the scheduler's queue: all of one request, or none."""

    def __init__(self, service: DecisionService, body: ClassifyRequest, started: float):
        """Raises ApiError for what cannot be served, QueueFullError where not all have a place."""
        inputs, scheduler = body.inputs, service.scheduler
        if service.kind == "text":
            refuse_closed(CLASSIFY, service)
        if len(inputs) > scheduler.capacity:
            problem = f"input: this server works on {scheduler.capacity} inputs at once, at most"
            raise ApiError(400, problem, code="too_many_prompts", param="input")
        self.texts: list[TextStream] = []
        self._service = service
        with ExitStack() as stack:
            # A request that must be refused costs no more than this.
            places = [stack.enter_context(service.reserve()) for _ in inputs]
            prompts = [_encode(each, service) for each in inputs]
            for tokens in prompts:
                refuse_too_long(len(tokens), None, scheduler.max_length, param="input")
            for place, tokens in zip(places, prompts, strict=True):
                (stream,) = place.submit(tokens, SamplingParams(max_tokens=1), priority=body.priority)
                stack.callback(stream.cancel)  # where a later one is not taken
                self.texts.append(TextStream(stream, service.tokenizer, started=started))
            stack.pop_all()

    def cancel(self) -> None:
        """Free the slots; may be called from any thread, and again."""
        for text in self.texts:
            text.cancel()

    def finish(self) -> None:
        """Wait for all of them."""
        for text in self.texts:
            for _ in text:
                pass

    def response(self) -> Classification:
        labels = self._service.tokenizer.labels
        judge = _scored if self._service.kind == "reward" else _classified
        return Classification(
            id=f"classify-{uuid.uuid4().hex}",
            object="list",
            created=int(time.time()),
            model=self._service.id,
            system_fingerprint=self._service.model.digest,
            data=[judge(index, _logits(text), labels) for index, text in enumerate(self.texts)],
            usage=usage_of(self.texts),
        )


def _logits(text: TextStream) -> np.ndarray:
    """What the head gave to the input, float64 [labels]."""
    assert text.prompt.logits_V is not None, "its answer is complete"
    return text.prompt.logits_V.astype(np.float64)


def _classified(index: int, logits: np.ndarray, labels: Sequence[str]) -> Classified:
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    probabilities = {labels[place]: float(shares[place]) for place in order}
    best = labels[order[0]]
    return Classified(index=index, label=best, probability=probabilities[best], probabilities=probabilities)


def _scored(index: int, logits: np.ndarray, labels: Sequence[str]) -> Scored:
    return Scored(index=index, score=float(logits[0]))


def _encode(given: str | Sequence[ChatMessage], service: DecisionService) -> list[int]:
    tokenizer, reward = service.tokenizer, service.kind == "reward"
    try:
        if not isinstance(given, str):
            return (encode_answered if reward else encode_messages)(given, tokenizer)
        if reward:
            raise ApiError(
                400, "input: a reward model scores conversations; send messages, the answer last", param="input"
            )
        return tokenizer.encode_prompt(service.domain.text_prompt(given))
    except ValidationError as error:  # a text that is none of the domain's
        raise ApiError(400, f"input: {explained(error)}", param="input") from None
    except UserError as error:  # the chat template does not take these messages
        raise ApiError(400, str(error), param="input") from None
