"""The HTTP interface: decisions, chat completions, documents, traces, health, metrics and the console page."""

# No `from __future__ import annotations`: the body of a decision is the domain's own model, and FastAPI must be handed
# the class itself.

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import anyio.to_thread
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model
from starlette.types import ASGIApp

from twinloop.common.errors import UserError
from twinloop.domains.documents import MAX_TEXT_CHARACTERS
from twinloop.domains.domain import Domain, Text
from twinloop.serving.access import OwnHostsOnly, administrators_only
from twinloop.serving.chat import chat_router, closed_route, models_router
from twinloop.serving.console import Access, console_page
from twinloop.serving.decisions import DecisionResponse, Passage
from twinloop.serving.errors import ApiError, field_descriptions, install
from twinloop.serving.knowledge.documents import DocumentStore, DocumentStoreError
from twinloop.serving.load_api import load_router
from twinloop.serving.metrics import Metrics
from twinloop.serving.middleware import AnswerAtTheEnd, CountRequests, LimitBody
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.protocol import Protocol
from twinloop.serving.traces import TraceStore
from twinloop.serving.traces_api import traces_router
from twinloop.serving.versions_api import Releases, versions_router
from twinloop.serving.work import Workers

log = logging.getLogger(__name__)

REFUSED = "it is corrupt, or does not load and answer, and it is not used; the server's log gives the reason"
DEFINITIONS = "#/$defs/"
COMPONENT = "Decision."
"""Before the name of a definition of the answer's schema: a model of the request may have the same one."""
SHUTDOWN_S = 10
"""How long running requests may take to end after SIGTERM."""


class DocumentText(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Text = Field(max_length=MAX_TEXT_CHARACTERS, description="the document's new text")


def create_app(
    manager: ModelManager,
    *,
    admin_token: str | None = None,
    local_admin: bool = True,
    releases: Releases | None = None,
) -> FastAPI:
    """The application that answers with the frozen model that `manager` holds, for that model's domain.

    releases: the registry that the model comes from, to be shown, and for administrators to promote and roll back in;
    without one its routes answer 404.

    Documents are changed, and traces are read, only with `admin_token` as the bearer token: a document decides answers,
    and a trace holds a customer's words. Where none is set, `local_admin`, for a server that listens on loopback only,
    lets this machine in, as far as a request can show that it comes from here; and then no request for a foreign host
    is answered at all. A proxy can hide that a request comes from elsewhere, so behind one a token must be set. The
    caller owns scheduler and traces and closes them after the server has stopped.
    """
    metrics, workers = Metrics(manager), Workers()
    # The interactive pages of FastAPI load scripts from elsewhere; /openapi.json and our own console stay.
    app = FastAPI(title="Twinloop", docs_url=None, redoc_url=None)
    domain, traces, documents = manager.service.domain, manager.service.traces, manager.service.documents
    install(app, field_descriptions(domain.request) if domain.request else {})
    # The last one is asked first, and counts what the others refuse.
    if local_admin and admin_token is None:
        app.add_middleware(OwnHostsOnly)
    app.add_middleware(LimitBody)
    app.add_middleware(AnswerAtTheEnd)
    app.add_middleware(CountRequests, metrics=metrics)
    chat, decisions = "/v1/chat/completions", "/v1/decisions"
    app.include_router(chat_router(manager, metrics, workers) if domain.serves_chat else closed_route(chat, domain))
    app.include_router(
        _decision_router(manager, metrics, workers) if domain.request else closed_route(decisions, domain)
    )
    app.include_router(models_router(manager))
    app.include_router(_document_router(documents))
    app.include_router(load_router(manager, metrics))
    administrator = administrators_only(admin_token, local_admin)
    guarded = [Depends(administrator)]
    app.include_router(_admin_router(documents, traces), dependencies=guarded)
    app.include_router(traces_router(traces), dependencies=guarded)
    app.include_router(versions_router(manager, releases, administrator, workers))

    @app.get("/health")
    def health() -> Response:
        service = manager.service
        scheduler = service.scheduler
        body: dict[str, Any] = {
            "model": service.model.model_dump(),
            "domain": domain.name,
            "refused_champion": {"version": manager.failure.version, "reason": REFUSED} if manager.failure else None,
            "queue": {"queued": scheduler.queued, "active": scheduler.active, "capacity": scheduler.capacity},
            "traces": {"dropped": traces.dropped} if traces is not None else None,
        }
        try:
            body["index"] = {"digest": documents.digest(), "documents": documents.count()}
        except DocumentStoreError as error:
            log.error("%s", error)
            return JSONResponse({"status": "failing", "reason": error.reason} | body, 503)
        if not scheduler.running:
            return JSONResponse({"status": "failing", "reason": "the engine has stopped"} | body, 503)
        return JSONResponse({"status": "ok"} | body)

    @app.get("/metrics")
    def prometheus() -> Response:
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4")

    _describe_definitions(app, domain)
    access: Access = "token" if admin_token is not None else "here" if local_admin else "nobody"
    page = console_page(domain, access=access, releases=releases is not None)

    @app.get("/", include_in_schema=False)
    def console() -> Response:
        headers = {"Content-Security-Policy": page.policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page.html, headers=headers)

    return app


def _decision_router(manager: ModelManager, metrics: Metrics, workers: Workers) -> APIRouter:
    router = APIRouter()
    domain = manager.service.domain
    body_model = domain.request
    assert body_model is not None

    # The answer's form is only described: it is made here, and its JSON is written once.
    @router.post("/v1/decisions", response_model=None, responses={200: {"model": _described_response(domain)}})
    async def decide(request: Request, body: body_model) -> Response:  # type: ignore[valid-type]
        started = time.perf_counter()
        pending = await anyio.to_thread.run_sync(manager.submit, lambda service: service.begin(body))
        response = await workers.run_unless_gone(request, pending.finish, pending.cancel)
        metrics.decided(response, pending.outcome)
        ttft_ms = response.timings.ttft_ms
        metrics.answered("decisions", time.perf_counter() - started, None if ttft_ms is None else ttft_ms / 1000)
        return Response(response.model_dump_json(), media_type="application/json")

    return router


def _described_response(domain: Domain) -> type[BaseModel]:
    """The response with the domain's own schema for its decision; `_describe_definitions` adds what it refers to."""
    schema = domain.answer_schema()
    if schema is None:
        return DecisionResponse
    own = {key: value for key, value in _to_components(schema).items() if key != "$defs"}
    decision = Annotated[Any, WithJsonSchema({"anyOf": [own, {"type": "null"}]})]
    described: type[BaseModel] = create_model("DecisionResponse", __base__=DecisionResponse, decision=(decision, ...))
    return described


def _describe_definitions(app: FastAPI, domain: Domain) -> None:
    """Add the `$defs` of the answer's schema, its nested models, to the components of /openapi.json."""
    definitions = _to_components((domain.answer_schema() or {}).get("$defs", {}))
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        described = generate()
        schemas = described.setdefault("components", {}).setdefault("schemas", {})
        schemas.update({f"{COMPONENT}{name}": schema for name, schema in definitions.items()})
        return described

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the description


def _to_components(schema: Any) -> Any:
    """The schema with its references to `$defs` as references to the description's components."""
    if isinstance(schema, Mapping):
        return {key: _to_component(value) if key == "$ref" else _to_components(value) for key, value in schema.items()}
    return [_to_components(each) for each in schema] if isinstance(schema, list) else schema


def _to_component(reference: Any) -> Any:
    inside = isinstance(reference, str) and reference.startswith(DEFINITIONS)
    return f"#/components/schemas/{COMPONENT}{reference.removeprefix(DEFINITIONS)}" if inside else reference


def _document_router(documents: DocumentStore) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/documents")
    def newest() -> dict[str, Any]:
        listed = documents.list_with_digest()
        return {"documents": [Passage.of(each).model_dump() for each in listed.documents], "digest": listed.digest}

    @router.get("/v1/documents/{document_id:path}")
    def history(document_id: str) -> dict[str, Any]:
        versions = documents.history(document_id)
        if not versions:
            raise ApiError(404, f"document {document_id!r} is not there", param="document_id")
        recorded = [
            {"version": each.document.version, "text": each.document.text, "recorded_at": each.recorded_at}
            for each in versions
        ]
        return {"document_id": document_id, "versions": recorded}

    return router


def _admin_router(documents: DocumentStore, traces: TraceStore | None) -> APIRouter:
    """Every route that only an administrator may use."""
    router = APIRouter()

    @router.put("/v1/documents/{document_id:path}")
    def put(document_id: str, body: DocumentText) -> Passage:
        return Passage.of(documents.put(document_id, body.text))

    @router.get("/v1/traces/{trace_id}")
    def trace(trace_id: str) -> dict[str, Any]:
        found = traces.get(trace_id) if traces is not None else None
        if found is None:
            raise ApiError(404, "no trace of that id is kept", param="trace_id")
        return found

    return router


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
    """Serve until SIGTERM or Ctrl-C; both let running requests end and return normally.

    Port 0 takes any free port; `on_ready` receives the address. Raises UserError when the address cannot be bound.
    """
    listener = _bind(host, port)
    server = uvicorn.Server(server_config(app))
    # uvicorn raises the signal again once it has shut down; a server that was asked to stop has not failed.
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    try:
        if on_ready is not None:
            shown = f"[{host}]" if ":" in host else host
            on_ready(f"http://{shown}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:  # the system would take the rest of a division by 65536
        raise UserError(f"{host}:{port}: not a port; choose a --port between 0 and 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With its protocol named, asyncio sends small answers at once; else each waits 40 ms for a delayed ACK.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise UserError(f"{host}:{port}: not an address to serve at ({error}); try --host 127.0.0.1") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"{host}:{port}: cannot be served at ({error.strerror}); choose another --port") from None
    return listener
