"""The page on which answers are judged: of this machine only, and under an address that only its user knows."""

from __future__ import annotations

import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from twinloop.flows.guard import ThisMachineOnly
from twinloop.serving.api import run_server

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from twinloop.evaluation.comparison import Judging

PAGE = Path(__file__).with_name("compare.html")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)


class Said(BaseModel):
    """What the page sends. question: as the page was given it, so that a click that comes twice counts once."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    said: Literal["left", "right", "tie", "later", "back"]


def judge_on_page(judging: Judging, port: int) -> None:
    """Serve the page until it is finished there, or by Ctrl-C."""
    secret = secrets.token_urlsafe(16)

    def ready(address: str) -> None:
        print(f"judge the answers at {address}/{secret}/ (Ctrl-C, or the page, ends it)", flush=True)

    run_server(judging_app(judging, secret), "127.0.0.1", port, on_ready=ready)


def judging_app(judging: Judging, secret: str) -> ASGIApp:
    """The page under /SECRET/, its next question, and what was said of it."""

    def state() -> dict[str, Any]:
        question = judging.question
        shown = None
        if question:
            shown = {
                "id": _id(judging),
                "prompt": [dict(message) for message in question.case.prompt],
                "left": question.left,
                "right": question.right,
            }
        return {"question": shown, "to_judge": judging.left, "judged": judging.judged}

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def look(request: Request) -> Response:
        return JSONResponse(state())

    async def say(request: Request) -> Response:
        try:
            said = Said.model_validate_json(await request.body())
        except ValidationError as error:
            return JSONResponse({"error": error.errors()[0]["msg"]}, 422)
        if said.said == "back":
            judging.take_back()
        elif said.question == _id(judging):
            if said.said == "later":
                judging.skip()
            else:
                judging.say(said.said)
        return JSONResponse(state())

    async def finish(request: Request) -> Response:
        signal.raise_signal(signal.SIGTERM)  # which run_server answers by ending once this answer is sent
        return JSONResponse({})

    routes = [
        Route("/", page),
        Route("/next", look),
        Route("/say", say, methods=["POST"]),
        Route("/finish", finish, methods=["POST"]),
    ]
    return ThisMachineOnly(
        Starlette(routes=[Route(f"/{secret}{each.path}", each.endpoint, methods=each.methods) for each in routes]),
        policy=POLICY,
    )


def _id(judging: Judging) -> str:
    return ":".join(judging.question.subject) if judging.question else ""
