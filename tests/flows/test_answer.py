"""What goes wrong while the champion is asked over HTTP is one line, and does not hide what was shipped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_project import make_project

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.evaluation.gate import GateReport
from twinloop.flows import answer
from twinloop.flows.answer import Answer, answer_over_http
from twinloop.flows.outcome import Outcome, Publication
from twinloop.flows.summary import show_outcome
from twinloop.registry.promotion import Promotion
from twinloop.registry.snapshot import Version
from twinloop.report.rows import StageRow


@pytest.fixture
def server() -> Iterator[Callable[[int, bytes], str]]:
    """Starts a server that answers every request with this status and body; gives its address."""
    running: list[HTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        running.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for each in running:
        each.shutdown()
        each.server_close()


@pytest.mark.parametrize(
    ("status", "body", "said"), [(500, b"", "HTTP Error 500"), (200, b"<html>", "Expecting value")]
)
def test_an_answer_that_is_none_is_one_line(server, status: int, body: bytes, said: str) -> None:
    with pytest.raises(UserError, match=rf"/v1/decisions: no answer \(.*{said}") as raised:
        answer._ask(server(status, body), "/v1/decisions", {"text": "hello"}, token="t")
    assert "\n" not in str(raised.value)


def test_the_request_is_kept_beside_its_answer(server) -> None:
    address = server(200, b'{"decision": "late"}')
    answered = answer._ask(address, "/v1/decisions", {"text": "hello"}, token="t")
    assert answered == Answer({"text": "hello"}, {"decision": "late"})


PROMOTION = Promotion("promote", "tiny", None, 1, "ada", "today", "g", "d")
VERSION = Version("tiny", 1, Path("exported"), None, {"manifest_digest": "d"})
SHIP = GateReport(decision="SHIP", reasons=(), checks=(), candidate="d", rules_digest="r")
DECIDED = {"decision": "late", "escalated": False, "model": {"version": "3"}}
CHATTED = {"choices": [{"message": {"content": "hi there"}}], "model": "chat"}


@pytest.mark.parametrize(("body", "said"), [(DECIDED, '{"decision": "late", '), (CHATTED, '{"answer": "hi there", ')])
def test_a_decision_and_a_chat_are_shown_with_what_was_asked(capsys, body: dict[str, Any], said: str) -> None:
    outcome = Outcome(Domain(), (), SHIP, Publication(VERSION, PROMOTION, None), Answer({"text": "hello"}, body))
    show_outcome(outcome, Console(width=150))
    shown = capsys.readouterr().out
    assert '{"text": "hello"} over HTTP:' in shown
    assert said in shown


def test_a_server_that_does_not_start_tells_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"serve: .*no champion"):
        answer_over_http(make_project(tmp_path), "small")


def test_a_server_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "START_WITHIN_S", 0.05)  # before Python itself is up
    with pytest.raises(UserError, match="no address within"):
        answer_over_http(make_project(tmp_path), "small")


def test_a_champion_that_does_not_answer_is_shown_beside_all_that_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(
        Domain(),
        (StageRow("pretrain", 406.0, reused=True),),
        SHIP,
        Publication(VERSION, PROMOTION, None),
        serve_error="serve: port in use",
    )
    show_outcome(outcome, Console(width=150))
    shown = capsys.readouterr().out
    assert "pretrain  (406.0 s)" in shown
    assert "no answer over HTTP: serve: port in use" in shown
    assert outcome.failure == "serve: port in use"
