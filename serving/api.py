"""The HTTP interface: decisions, chat completions, policies, traces, health, metrics and the console page."""

# No `from __future__ import annotations`: the request model of decisions is made from the domain at run time, and
# FastAPI must be handed the class itself.

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import anyio.to_thread
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from starlette.types import ASGIApp

from twinloop.common.errors import UserError
from twinloop.domains.returns.policies import MAX_TEXT_CHARACTERS
from twinloop.serving.access import OwnHostsOnly, administrators_only
from twinloop.serving.chat import chat_router
from twinloop.serving.console import CONTENT_SECURITY_POLICY, PAGE
from twinloop.serving.decisions import DecisionResponse, Passage
from twinloop.serving.errors import ApiError, install
from twinloop.serving.metrics import Metrics
from twinloop.serving.middleware import AnswerAtTheEnd, CountRequests, LimitBody
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.protocol import Protocol
from twinloop.serving.retrieval import PolicyIndex, PolicyIndexError
from twinloop.serving.traces import TraceStore
from twinloop.serving.work import Workers

log = logging.getLogger(__name__)

REFUSED = "it is damaged, or does not load and answer, and it is not used; the server's log says which"
SHUTDOWN_S = 10
"""How long running requests may take to end after SIGTERM."""


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


_Text = Annotated[str, AfterValidator(_without_nul)]


class PolicyText(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(max_length=2 * MAX_TEXT_CHARACTERS, description="a sentence that names its window in days")


def create_app(manager: ModelManager[Any], *, admin_token: str | None = None, local_admin: bool = True) -> FastAPI:
    """The application that answers with the frozen model that `manager` holds.

    Policies are changed, and traces are read, only with `admin_token` as the bearer token: a policy decides money, and
    a trace holds a customer's words. Where none is set, `local_admin`, for a server that listens on loopback only, lets
    this machine in, as far as a request can show that it comes from here; and then no request for a foreign host is
    answered at all. A proxy can hide that a request comes from elsewhere, so behind one a token must be set. The caller
    owns scheduler and traces and closes them after the server has stopped.
    """
    metrics, workers = Metrics(), Workers()
    # The interactive pages of FastAPI load scripts from elsewhere; /openapi.json and our own console stay.
    app = FastAPI(title="Twinloop", docs_url=None, redoc_url=None)
    domain, traces, index = manager.service.domain, manager.service.traces, manager.service.index
    fields = domain.order_model.model_fields
    install(app, {f"order.{name}": field.description for name, field in fields.items() if field.description})
    # The last one is asked first, and counts what the others refuse.
    if local_admin and admin_token is None:
        app.add_middleware(OwnHostsOnly)
    app.add_middleware(LimitBody)
    app.add_middleware(AnswerAtTheEnd)
    app.add_middleware(CountRequests, metrics=metrics)
    app.include_router(chat_router(manager, metrics, workers))
    app.include_router(_decision_router(manager, metrics, workers))
    app.include_router(_policy_router(index))
    guarded = [Depends(administrators_only(admin_token, local_admin))]
    app.include_router(_admin_router(index, traces), dependencies=guarded)

    @app.get("/health")
    def health() -> Response:
        service = manager.service
        scheduler = service.scheduler
        body: dict[str, Any] = {
            "model": service.model.model_dump(),
            "refused_champion": {"version": manager.refusal.version, "reason": REFUSED} if manager.refusal else None,
            "queue": {"queued": scheduler.queued, "active": scheduler.active, "capacity": scheduler.capacity},
            "traces": {"dropped": traces.dropped} if traces is not None else None,
        }
        try:
            body["index"] = {"digest": index.digest(), "policies": len(index.list())}
        except PolicyIndexError as error:
            log.error("%s", error)
            return JSONResponse({"status": "failing", "reason": error.reason} | body, 503)
        if not scheduler.running:
            return JSONResponse({"status": "failing", "reason": "the engine has stopped"} | body, 503)
        return JSONResponse({"status": "ok"} | body)

    @app.get("/metrics")
    def prometheus() -> Response:
        _read_schedulers(metrics, manager)
        if traces is not None:
            metrics.set("twinloop_traces_dropped", traces.dropped)
        with suppress(PolicyIndexError):  # /health says what is wrong with the index
            metrics.set("twinloop_policies", len(index.list()))
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    def console() -> Response:
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(PAGE, headers=headers)

    return app


def _read_schedulers(metrics: Metrics, manager: ModelManager[Any]) -> None:
    now, totals = manager.service.scheduler.metrics(), manager.totals()
    metrics.set("twinloop_queued_requests", now.queued)
    metrics.set("twinloop_active_requests", now.active)
    metrics.set("twinloop_slots", now.slots)
    metrics.set("twinloop_tokens_per_second", now.tokens_per_s)
    metrics.set("twinloop_champion_refused", manager.refusal is not None)
    metrics.set("twinloop_tokens_total", totals.prompt_tokens, kind="prompt")
    metrics.set("twinloop_tokens_total", totals.completion_tokens, kind="completion")
    for end in ("finished", "failed", "cancelled"):
        metrics.set("twinloop_answers_total", getattr(totals, end), end=end)


def _decision_router(manager: ModelManager[Any], metrics: Metrics, workers: Workers) -> APIRouter:
    router = APIRouter()
    order_model, limit = manager.service.domain.order_model, manager.service.domain.max_message_characters
    decision_request = create_model(
        "DecisionRequest",
        __config__=ConfigDict(frozen=True, extra="forbid", strict=True),
        order=(order_model, Field(description="trusted facts, from the shop's own records")),
        message=(_Text, Field("", max_length=limit, description="the customer's words, trusted in nothing")),
    )

    @router.post("/v1/decisions")
    async def decide(request: Request, body: decision_request) -> DecisionResponse:  # type: ignore[valid-type]
        started = time.perf_counter()
        order, message = body.order, body.message  # type: ignore[attr-defined]
        pending = await anyio.to_thread.run_sync(manager.submit, lambda service: service.begin(order, message))
        response = await workers.run_unless_gone(request, pending.finish, pending.cancel)
        _observe(metrics, response, time.perf_counter() - started)
        return response

    return router


def _observe(metrics: Metrics, response: DecisionResponse, seconds: float) -> None:
    if response.decision is None:
        outcome = "escalated"
    else:
        outcome = "eligible" if response.decision.get("eligible") else "not_eligible"
    metrics.count("twinloop_decisions_total", outcome=outcome)
    for reason in response.reasons:
        metrics.count("twinloop_escalations_total", predicate=reason.predicate)
    metrics.observe("twinloop_request_seconds", seconds, route="decisions")
    if response.timings.ttft_ms is not None:
        metrics.observe("twinloop_time_to_first_token_seconds", response.timings.ttft_ms / 1000, route="decisions")


def _policy_router(index: PolicyIndex) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/policies")
    def policies() -> dict[str, Any]:
        return {"policies": [asdict(policy) for policy in index.list()], "digest": index.digest()}

    @router.get("/v1/policies/{policy_id}")
    def history(policy_id: str) -> dict[str, Any]:
        versions = index.history(policy_id)
        if not versions:
            raise ApiError(404, f"policy {policy_id!r} is not in the index", param="policy_id")
        return {"policy_id": policy_id, "versions": [asdict(policy) for policy in versions]}

    return router


def _admin_router(index: PolicyIndex, traces: TraceStore | None) -> APIRouter:
    """Every route that only an administrator may use."""
    router = APIRouter()

    @router.put("/v1/policies/{policy_id}")
    def put(policy_id: str, body: PolicyText) -> Passage:
        policy = index.put(policy_id, body.text)
        return Passage(policy_id=policy.policy_id, version=policy.version, text=policy.text)

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
        proxy_headers=False,  # who asks is the socket's other end, not what it says of itself
    )


def run_server(app: ASGIApp, host: str, port: int, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; both let running requests end and return normally.

    Port 0 takes any free port; `on_ready` is told the address. Raises UserError when the address cannot be bound.
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
