"""The HTTP interface: decisions, chat completions, documents, traces, health, metrics and the console page."""

# No `from __future__ import annotations`: the body of a decision is the domain's own model, and FastAPI must be handed
# the class itself.

import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import uvicorn
from fastapi import APIRouter, Body, FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.types import ASGIApp

from twinloop.serving.access import OtherOrigins, OwnHostsOnly, administrators_only
from twinloop.serving.answers import Answers, charge
from twinloop.serving.asked import ModelName, Priority
from twinloop.serving.chat import chat_router
from twinloop.serving.classify import classify_router
from twinloop.serving.completions import completions_router
from twinloop.serving.console import Access, console_page
from twinloop.serving.decisions import DecisionService, PendingDecision
from twinloop.serving.described import ASK_WORDS, ASKING, decision_response, describe, errors, guard
from twinloop.serving.document_routes import admin_router, document_router
from twinloop.serving.drain import Draining, DrainingServer
from twinloop.serving.errors import METHODS, field_descriptions, install
from twinloop.serving.health import refuse_closed, state_router
from twinloop.serving.key_access import RequireKey
from twinloop.serving.keys import KeyStore
from twinloop.serving.limits import Accounts
from twinloop.serving.listener import SHUTDOWN_S, address_of, listen
from twinloop.serving.load_api import load_router
from twinloop.serving.metrics import CHAT, COMPLETIONS, DECISIONS, Metrics
from twinloop.serving.middleware import (
    AnswerAtTheEnd,
    AnswerHead,
    CountRequests,
    Deadline,
    LimitBody,
    ReadRest,
    RefuseWhenFull,
)
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.protocol import Protocol
from twinloop.serving.tokens import tokens_router
from twinloop.serving.traces_api import traces_router
from twinloop.serving.versions_api import Releases, versions_router
from twinloop.serving.work import Workers
from twinloop.serving.worker_process import WorkerProcess

EMBEDDINGS, RESPONSES = "/v1/embeddings", "/v1/responses"
ASK_CHAT = "chats are asked as chat completions (Vercel's AI SDK: openai.chat(model))"
DEADLINE_S = 600.0
"""How long a request may take: as long as OpenAI's clients wait."""


def create_app(
    manager: ModelManager,
    *,
    admin_token: str | None = None,
    local_admin: bool = True,
    cors_origins: Sequence[str] = (),
    releases: Releases | None = None,
    keys: KeyStore | None = None,
    deadline_s: float = DEADLINE_S,
    process: WorkerProcess | None = None,
) -> FastAPI:
    """The application that answers with the frozen model that `manager` holds, for that model's domain.

    releases: the registry that the model comes from, to be shown, and for administrators to promote and roll back in;
    without one its routes answer 404.

    Documents are changed, the champion is moved, and traces are read only with `admin_token` as the bearer token: a
    document and the champion decide answers, and a trace holds a customer's words. Where none is set, `local_admin`,
    for a server that listens on loopback only, lets this machine in, as far as a request can show that it comes from
    here; and then no request for a foreign host is answered at all. A proxy can hide that a request comes from
    elsewhere, so behind one a token must be set.
    `keys`: once it has had a key, nothing but `/health` and its probes is answered without one; a key makes nobody an
    administrator, and the administrator's token is a key (`key_access.py`). `deadline_s`: for a request as a whole.
    `cors_origins`: of whose pages a browser may ask (`access.origin`). `process`: this one, where it is one of several
    that serve at one address; then limits and metrics are those of all. The caller owns scheduler and traces and closes
    them after the server has stopped.
    """
    metrics, workers = Metrics(manager, process), Workers()
    # The interactive pages of FastAPI load scripts from elsewhere; /openapi.json and our own console stay.
    app = FastAPI(title="Twinloop", docs_url=None, redoc_url=None, redirect_slashes=False)
    domain, traces, documents = manager.service.domain, manager.service.traces, manager.service.documents
    install(app, field_descriptions(domain.request) if domain.request else {})
    # The last one is asked first, and counts what the others refuse.
    app.add_middleware(RefuseWhenFull, full=lambda: manager.service.scheduler.full)
    if keys is not None:
        accounts = Accounts(None if process is None else process.limits)
        app.add_middleware(RequireKey, keys=keys, admin_token=admin_token, accounts=accounts)
    if local_admin and admin_token is None:
        app.add_middleware(OwnHostsOnly)
    app.add_middleware(LimitBody)
    app.add_middleware(Deadline, seconds=deadline_s)
    app.add_middleware(AnswerAtTheEnd)
    if cors_origins:
        app.add_middleware(OtherOrigins, origins=cors_origins)
    app.add_middleware(CountRequests, metrics=metrics)
    app.add_middleware(AnswerHead)
    not_served = f"the model's domain is {domain.name}"
    if domain.serves_chat:
        answers = Answers(metrics, workers)
        app.include_router(chat_router(manager, answers))
        app.include_router(completions_router(manager, answers))
    else:
        app.include_router(_closed_router(manager, not_served, CHAT, COMPLETIONS))
    app.include_router(
        _decision_router(manager, metrics, workers)
        if domain.request
        else _closed_router(manager, not_served, DECISIONS)
    )
    app.include_router(classify_router(manager, metrics, workers))
    app.include_router(_closed_router(manager, "the model is a decoder, which embeds no text", EMBEDDINGS))
    app.include_router(_closed_router(manager, ASK_CHAT, RESPONSES))
    app.include_router(tokens_router(manager))
    app.include_router(state_router(manager, metrics))
    app.include_router(load_router(metrics))
    app.include_router(document_router(documents))
    administrators = guard(administrators_only(admin_token, local_admin), by_token=admin_token is not None)
    app.include_router(admin_router(domain, documents, administrators))
    app.include_router(traces_router(traces, administrators))
    app.include_router(versions_router(manager, releases, administrators))

    describe(app, domain, keys=keys is not None)
    access: Access = "token" if admin_token is not None else "here" if local_admin else "nobody"
    page = console_page(domain, access=access, releases=releases is not None)

    @app.get("/", include_in_schema=False)
    def console() -> Response:
        headers = {"Content-Security-Policy": page.policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page.html, headers=headers)

    return app


def _closed_router(manager: ModelManager, why: str, *paths: str) -> APIRouter:
    """In the place of what the model or its domain does not serve: a 404 that names where the model is asked."""
    router = APIRouter()

    def closed(request: Request) -> None:
        refuse_closed(request.url.path, manager.service, why)

    for path in paths:
        router.add_api_route(path, closed, methods=[*METHODS], include_in_schema=False)
    return router


def _decision_router(manager: ModelManager, metrics: Metrics, workers: Workers) -> APIRouter:
    router = APIRouter()
    domain = manager.service.domain
    body_model = domain.request
    assert body_model is not None

    # The answer's form is only described: it is made here, and its JSON is written once.
    described = Body(examples=[dict(domain.example)] if domain.example else None)
    responses = {**errors(*ASKING, 404, 422, words=ASK_WORDS), 200: {"model": decision_response(domain)}}

    @router.post(DECISIONS, response_model=None, responses=responses)
    async def decide(
        request: Request,
        body: Annotated[body_model, described],  # type: ignore[valid-type]
        model: Annotated[ModelName | None, Query(description="as `model` of a chat: one that /v1/models lists")] = None,
        priority: Annotated[Priority, Query()] = 0,
    ) -> Response:
        started = time.perf_counter()
        pending = await workers.submit(manager, lambda service: _begin(service, body, priority), model)
        try:
            (response,) = await workers.run_unless_gone(request, pending.cancel, pending.finish)
        finally:
            metrics.ended(pending.texts)
            charge(request, pending.texts)
        metrics.decided(response, pending.outcome)
        ttft_ms = response.timings.ttft_ms
        metrics.answered("decisions", time.perf_counter() - started, None if ttft_ms is None else ttft_ms / 1000)
        return Response(response.model_dump_json(), media_type="application/json")

    return router


def _begin(service: DecisionService, body: BaseModel, priority: int) -> PendingDecision:
    if service.kind == "reward":
        refuse_closed(DECISIONS, service)
    return service.begin(body, priority=priority)


def server_config(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        server_header=False,
        proxy_headers=False,  # who asks is the socket's other end, not the address that its headers claim
    )


def run_server(app: ASGIApp, host: str, port: int, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; both let running requests end, refuse others meanwhile, and return normally.

    Port 0 takes any free port; `on_ready` receives the address. Raises UserError when the address cannot be bound.
    """
    listener = listen(host, port)
    serve(app, listener, on_ready=lambda: on_ready(address_of(host, listener)) if on_ready is not None else None)


def serve(app: ASGIApp, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """`run_server` at a socket that listens already, which it closes."""
    draining = Draining(app)
    server = DrainingServer(server_config(ReadRest(draining)), draining)
    # uvicorn takes signals only once it runs, and raises them again once it has shut down; a server that was asked to
    # stop, at whatever moment, stops and has not failed.
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
    before = {number: signal.signal(number, lambda *_: setattr(server, "should_exit", True)) for number in handled}
    try:
        on_ready()
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()
