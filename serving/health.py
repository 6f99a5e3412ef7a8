"""What a server says of itself: its health, its metrics, and which model it serves for what."""

from __future__ import annotations

import logging
import time
from typing import Any, Literal, NoReturn

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from twinloop.domains.domain import Domain
from twinloop.models.config import Kind
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.described import HEALTH, LIVE, READY, errors
from twinloop.serving.errors import ENGINE_DIED, ApiError, ErrorDetail, error_body
from twinloop.serving.knowledge.documents import DocumentStoreError
from twinloop.serving.metrics import CHAT, CLASSIFY, COMPLETIONS, DECISIONS, Metrics
from twinloop.serving.model_manager import Degradation, ModelManager
from twinloop.serving.named import NamedVersion

log = logging.getLogger(__name__)

METRICS_TYPE = "text/plain; version=0.0.4"


class Purpose(BaseModel):
    """What the served model is for. `prompt` says what it was trained to be asked; anything else gets a meaningless
    answer."""

    description: str
    routes: list[str]
    prompt: str


class RefusedChampion(BaseModel):
    version: str
    reason: str


class Queue(BaseModel):
    """Requests: waiting, being answered, and how many are taken at most."""

    queued: int
    active: int
    capacity: int


class Traces(BaseModel):
    dropped: int


class Index(BaseModel):
    """`digest` is of all versions ever put, `contents` of the documents that are found now, and `measured_with` what
    `contents` was where the model was trained and evaluated; null where that was not recorded."""

    digest: str
    documents: int
    contents: str
    measured_with: str | None


class Health(BaseModel):
    """Status 200 and `ok` wherever requests are answered; `degraded` says, by kind, what is not as it should be."""

    status: Literal["ok", "failing"]
    degraded: dict[Degradation, str]
    model: ModelInfo
    domain: str
    purpose: Purpose
    refused_champion: RefusedChampion | None
    queue: Queue
    traces: Traces | None
    index: Index | None
    error: ErrorDetail | None


class Probe(BaseModel):
    """What an orchestrator asks again and again."""

    status: Literal["ok", "failing"]
    error: ErrorDetail | None


class ModelObject(BaseModel):
    """OpenAI's model, with what is served, what it is for, and where it is asked. `id` is what a request's `model`
    says: the served model's name, or a version on the same base, such as `returns:v7`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    version: str
    digest: str
    domain: str
    description: str
    routes: list[str]
    prompt: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelObject]


def routes_of(domain: Domain, kind: Kind) -> list[str]:
    """Where a model of this domain and kind is asked."""
    decides = [DECISIONS] * (domain.request is not None)
    if kind == "text":
        return decides + [CHAT, COMPLETIONS] * domain.serves_chat
    return [CLASSIFY] if kind == "reward" else [*decides, CLASSIFY]


def purpose_of(domain: Domain, kind: Kind) -> Purpose:
    """What a model of this domain and kind is for."""
    routes = routes_of(domain, kind)
    if kind != "text":
        scored = "a conversation, the answer to be scored last"
        asked = scored if kind == "reward" else "a text, or the messages of a prompt"
        return Purpose(description=domain.description, routes=routes, prompt=f"{asked}, to {CLASSIFY}")
    decides = f"the fields of a request to {DECISIONS}, from which the server makes the prompt"
    if domain.request is None:
        prompt = "the messages of a chat, or a text to go on with"
    else:
        others = ", the messages of a chat, or a text to go on with" if domain.serves_chat else "; no other text"
        prompt = f"{decides}{others}"
    return Purpose(description=domain.description, routes=routes, prompt=prompt)


def state_router(manager: ModelManager, metrics: Metrics) -> APIRouter:
    """`GET /health` and its probes, `GET /metrics` and `GET /v1/models`."""
    router = APIRouter()
    created = int(time.time())

    failing = errors(words={503: "Requests are not answered: the body is `Health`, with `error` as everywhere"})
    probed = {**errors(words={503: "No: the body is `Probe`, with `error` as everywhere"}), 200: {"model": Probe}}

    def stopped() -> str | None:
        scheduler = manager.service.scheduler
        return ENGINE_DIED if scheduler.died else None if scheduler.running else "the engine has stopped"

    def looked() -> Health:
        try:
            index, degraded, problem = _index(manager.service), manager.degraded(), None
        except DocumentStoreError as error:
            log.error("%s", error)
            index, degraded, problem = None, {}, error.reason
        return _health(manager, index, degraded, stopped() or problem)

    @router.get(HEALTH, response_model=None, responses={**failing, 200: {"model": Health}})
    def health() -> Response:
        found = looked()
        return JSONResponse(found.model_dump(), 503 if found.error else 200)

    @router.get(LIVE, response_model=None, responses=probed)
    def live() -> Response:
        """Whether to leave the server running: nothing but a new start helps one whose engine has stopped."""
        return _probe(_error(stopped()))

    @router.get(READY, response_model=None, responses=probed)
    def ready() -> Response:
        """Whether to send requests, as `/health` says it."""
        return _probe(looked().error)

    text = {"text/plain": {"schema": {"type": "string"}}}

    @router.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={**errors(), 200: {"content": text, "description": "In version 0.0.4 of Prometheus's text form"}},
    )
    def prometheus() -> Response:
        return PlainTextResponse(metrics.render(), media_type=METRICS_TYPE)

    @router.get("/v1/models", responses=errors())
    def models() -> ModelList:
        service, others = manager.service, manager.listed()
        return ModelList(object="list", data=[_model_object(service, each, created) for each in (None, *others)])

    @router.get("/v1/models/{name}", responses=errors(404))
    def one_model(name: str) -> ModelObject:
        return _model_object(manager.service, manager.find(name), created)

    return router


def refuse_closed(what: str, service: DecisionService, why: str | None = None) -> NoReturn:
    """Raises ApiError for what is not served, with the routes at which the served model is asked. why: unless that is
    what the model gives."""
    gives = "scores" if service.kind == "reward" else service.kind
    there = " and ".join(f"POST {route}" for route in routes_of(service.domain, service.kind)) or "nothing"
    raise ApiError(404, f"{what}: not served, since {why or f'the model gives {gives}'}; it answers {there}")


def _health(
    manager: ModelManager, index: Index | None, degraded: dict[Degradation, str], problem: str | None
) -> Health:
    service, failure = manager.service, manager.failure
    scheduler, traces = service.scheduler, service.traces
    return Health(
        status="failing" if problem else "ok",
        degraded=degraded,
        model=service.model,
        domain=service.domain.name,
        purpose=purpose_of(service.domain, service.kind),
        refused_champion=RefusedChampion(version=failure.version, reason=failure.public) if failure else None,
        queue=Queue(queued=scheduler.queued, active=scheduler.active, capacity=scheduler.capacity),
        traces=Traces(dropped=traces.dropped) if traces is not None else None,
        index=index,
        error=_error(problem),
    )


def _error(problem: str | None) -> ErrorDetail | None:
    return ErrorDetail(**error_body(503, problem)["error"]) if problem else None


def _probe(error: ErrorDetail | None) -> Response:
    return JSONResponse(Probe(status="failing" if error else "ok", error=error).model_dump(), 503 if error else 200)


def _index(service: DecisionService) -> Index:
    documents = service.documents
    return Index(
        digest=documents.digest(),
        documents=documents.count(),
        contents=documents.contents(),
        measured_with=service.measured_documents,
    )


def _model_object(service: DecisionService, version: NamedVersion | None, created: int) -> ModelObject:
    """version: a version beside the served one; None for that."""
    model = service.model if version is None else version.model
    id, purpose = service.id if version is None else version.id, purpose_of(service.domain, service.kind)
    known: dict[str, Any] = {"id": id, "object": "model", "created": created, "owned_by": "twinloop"}
    known |= {"version": model.version, "digest": model.digest, "domain": service.domain.name}
    return ModelObject(**known, **purpose.model_dump())
