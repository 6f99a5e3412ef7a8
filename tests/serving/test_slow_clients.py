"""Clients that are slow to ask or to read: none holds its connection for ever."""

import json
import socket
import time
from contextlib import suppress

import psutil
import pytest
from served import HELLO, ScriptedScheduler, make_app, running, wait_until
from test_clients import read_all, request_of

from twinloop.serving import middleware, protocol

CHAT = "/v1/chat/completions"
LONG = {"messages": HELLO, "logprobs": True, "top_logprobs": 5}


class Counted:
    """The application, and how many requests are in it."""

    def __init__(self, app):
        self.app, self.running = app, 0

    async def __call__(self, scope, receive, send):
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


@pytest.fixture
def served(tmp_path, tokenizer, monkeypatch):
    """A server with short limits; its application and its client."""
    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    monkeypatch.setattr(middleware, "LAST_S", 1.0)
    app = Counted(make_app(tmp_path, ScriptedScheduler(tokenizer, "x" * 900), tokenizer, deadline_s=2.0))
    with running(app) as client:
        yield app, client


def connect(client, receive_bytes=None):
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", client.base_url.port))
    return connection


def held(client):
    """Connections that the server has not closed."""
    connections = psutil.Process().net_connections("tcp")
    return [each for each in connections if each.laddr.port == client.base_url.port and each.status == "ESTABLISHED"]


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_connection_without_a_complete_head_is_closed(served, sent):
    _, client = served
    with connect(client) as connection:
        connection.sendall(sent)
        assert read_all(connection) == b""


def test_a_connection_on_which_half_a_head_follows_an_answer_is_closed(served):
    _, client = served
    with connect(client) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health/live HT")
        time.sleep(0.3)
        connection.sendall(b"TP/1.1\r\n")  # what comes meanwhile does not prolong it
        started = time.monotonic()
        assert read_all(connection).count(b"HTTP/1.1 200") == 1
        assert time.monotonic() - started < 3


def test_an_answer_that_takes_longer_than_a_head_may_is_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.1)
    with running(make_app(tmp_path, ScriptedScheduler(tokenizer, delay_s=0.01), tokenizer)) as client:
        assert client.post(CHAT, json={"messages": HELLO}).status_code == 200
        assert client.post(CHAT, json={"messages": HELLO}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_its_answer_loses_its_connection(served, stream, monkeypatch):
    app, client = served

    def with_a_small_buffer(self, transport, made=protocol.Protocol.connection_made):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(protocol.Protocol, "connection_made", with_a_small_buffer)
    with connect(client, receive_bytes=4096) as connection:
        connection.sendall(request_of((CHAT, json.dumps(LONG | {"stream": stream}).encode())))
        wait_until(lambda: app.running)
        wait_until(lambda: not app.running and not held(client), 30)
        with suppress(ConnectionResetError):
            assert not read_all(connection).endswith(b"0\r\n\r\n")
    assert client.get("/health").status_code == 200
