"""Clients that leave, and clients that break HTTP: what a server process answers, counts and logs."""

import asyncio
import json
import re
import signal
import socket
import struct
import subprocess
import time
from contextlib import suppress

import httpx
import pytest
from served import CASE, GOOD, HELLO, SERVER, wait_until

from twinloop.serving.listener import listen
from twinloop.serving.middleware import MAX_BODY_BYTES

DECISION = ("/v1/decisions", json.dumps(CASE).encode())
CHAT = ("/v1/chat/completions", json.dumps({"messages": HELLO}).encode())
STREAM = ("/v1/chat/completions", json.dumps({"messages": HELLO, "stream": True}).encode())
ASKED = pytest.mark.parametrize("asked", [DECISION, CHAT, STREAM], ids=["decision", "chat", "stream"])
TOO_LARGE = MAX_BODY_BYTES + 1
GARBAGE = b"\x00garbage\r\n\r\n"


class ServerProcess:
    """A real server, its address and its log."""

    def __init__(self, folder, *arguments):
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*SERVER, str(folder), *arguments], stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.rsplit(":", 1)[1])
        self.client = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def counted(self, name, **labels):
        wanted = "{" + ",".join(f'{key}="{value}"' for key, value in sorted(labels.items())) + "}"
        found = re.search(re.escape(name + wanted) + r" (\S+)", self.client.get("/metrics").text)
        return float(found[1]) if found else 0


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    server = ServerProcess(tmp_path_factory.mktemp("server"), "0.01")
    yield server
    server.client.close()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


@pytest.fixture
def server(process):
    """The server of this module; what it logs in a test is at most one line, and it answers afterwards."""
    before = process.log.stat().st_size
    yield process
    assert process.client.get("/health").status_code == 200
    logged = process.log.read_bytes()[before:].decode().splitlines()
    assert len(logged) <= 1, "\n".join(logged)


def request_of(asked, *headers, version="1.1", length=None):
    path, body = asked
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_answer(connection):
    """The head and the body of an answer that says its length: they may come one after the other."""
    received = b""
    while not (found := re.match(rb"(.*?)\r\n\r\n(.*)", received, re.DOTALL)) or len(found[2]) < length_of(found[1]):
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return found[1], found[2]


def length_of(head):
    return int(re.search(rb"(?i)content-length: (\d+)", head)[1])


def read_all(connection):
    received = b""
    with suppress(ConnectionResetError):  # where there was more that the server did not read
        while piece := connection.recv(65536):
            received += piece
    return received


def leave(connection, how):
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "half-closed":
        connection.shutdown(socket.SHUT_WR)
        read_all(connection)
    connection.close()


@ASKED
@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
@pytest.mark.parametrize("part", ["half the body", "all"])
def test_a_client_that_leaves_is_counted_and_not_logged(server, asked, how, part):
    route = asked[0]
    before = server.counted("twinloop_clients_gone_total", route=route)
    decisions = server.counted("twinloop_decisions_total", outcome="escalated")
    answers = server.counted("twinloop_requests_total", route=route, status="503")
    connection = server.connect()
    whole = request_of(asked)
    connection.sendall(whole if part == "all" else whole[:-10])
    time.sleep(0.1)  # some 40 tokens of 10 ms: in the middle of the answer
    leave(connection, how)
    wait_until(lambda: server.counted("twinloop_clients_gone_total", route=route) == before + 1)
    assert server.log.read_text().count("Traceback") == 0
    assert server.counted("twinloop_decisions_total", outcome="escalated") == decisions
    assert server.counted("twinloop_requests_total", route=route, status="503") == answers


@ASKED
@pytest.mark.parametrize("at_once", [True, False])
def test_what_follows_an_accepted_request_and_is_no_request_does_not_cost_its_answer(server, asked, at_once):
    with server.connect() as connection:
        connection.sendall(request_of(asked) + (GARBAGE if at_once else b""))
        if not at_once:
            time.sleep(0.1)
            connection.sendall(GARBAGE)
            connection.sendall(GARBAGE)
        received = read_all(connection)
    answer, _, error = received.partition(b"HTTP/1.1 400")
    assert answer.startswith(b"HTTP/1.1 200")
    assert whole_answer(asked, answer)
    if at_once:  # where the client still sends when the server closes, the reset may overtake the error
        assert json.loads(error.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@ASKED
@pytest.mark.parametrize(("version", "header"), [("1.1", "Connection: close"), ("1.0", "X-Nothing: 1")])
@pytest.mark.parametrize("more", [GARBAGE, request_of(CHAT), b"\r\n"], ids=["garbage", "a request", "an empty line"])
def test_nothing_after_a_last_request_reaches_its_answer(server, asked, version, header, more):
    with server.connect() as connection:
        connection.sendall(request_of(asked, header, version=version))
        time.sleep(0.1)
        connection.sendall(more)
        received = read_all(connection)
    assert received.count(b"HTTP/1.1") == 1
    assert whole_answer(asked, received)


def whole_answer(asked, answer):
    """Whether the script's text is in an answer from its first to its last character."""
    text = answer.partition(b"\r\n\r\n")[2].decode()
    if asked is STREAM:
        chunks = re.findall(r"^data: (\{.*)$", text, re.MULTILINE)
        pieces = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
        return "data: [DONE]" in text and "".join(pieces) == GOOD
    body = json.loads(text)
    if asked is DECISION:
        return body["decision"] == json.loads(GOOD)
    return body["choices"][0]["message"]["content"] == GOOD


CHUNKED = "POST {} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSING_CHUNKED = CHUNKED.format(CHAT[0])[:-2].encode() + b"Connection: close\r\nExpect: 100-continue\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "then", "status"),
    [
        (CHUNKED.format(CHAT[0]), b"zz\r\nhello\r\n0\r\n\r\n", 400),
        (CHUNKED.format(CHAT[0]) + "5\r\nhello\r\n", b"zz\r\n\r\n", 400),
        (CHUNKED.format("/health").replace("POST", "GET"), b"zz\r\n\r\n", 200),
        (CHUNKED.format("/no/such/path"), b"zz\r\n\r\n", 404),
        (CHUNKED.format(CHAT[0]) + f"{TOO_LARGE:x}\r\n" + "x" * TOO_LARGE + "\r\n", b"zz\r\n\r\n", 413),
        (CHUNKED.format("/v1/models").replace("POST", "HEAD"), b"zz\r\n\r\n", 200),
        ("POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", b"", 400),
        ("\x16\x03\x01\x02\r\n\r\n", b"", 400),
        ("PRI * HTTP/2.0\r\n\r\n", b"SM\r\n\r\n", 403),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + "x" * 200_000, b"\r\n\r\n", 400),
        ("GET /health HTTP/1.1\r\n\r\n", b"", 400),
    ],
)
def test_what_breaks_http_has_one_answer_and_one_line(server, first, then, status):
    with server.connect() as connection:
        with suppress(OSError):  # it may have closed before it was sent all
            connection.sendall(first.encode("latin-1"))
            time.sleep(0.2)
            connection.sendall(then)
        received = read_all(connection)
    assert int(received.split(maxsplit=2)[1]) == status
    last = received.rpartition(b"\r\n\r\n")[2]
    assert not last or isinstance(json.loads(last), dict)


@pytest.mark.parametrize(
    ("path", "length", "status"), [(CHAT[0], TOO_LARGE, 413), ("/no/such/path", TOO_LARGE, 413), ("/no", 200_000, 404)]
)
def test_who_is_answered_in_the_middle_of_a_body_can_send_its_rest_and_is_not_reset(server, path, length, status):
    with server.connect() as connection:
        connection.sendall(request_of((path, b""), length=length) + b"x" * 1000)
        head, body = read_answer(connection)
        assert int(head.split(maxsplit=2)[1]) == status
        assert json.loads(body)["error"]["message"]
        for sent in range(1000, length, 1_000_000):
            connection.sendall(b"x" * min(1_000_000, length - sent))
        if b"connection: close" not in head.lower():
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        while connection.recv(65536):  # a reset would raise
            pass


def test_who_waited_to_be_asked_for_a_body_is_not_reset_in_its_middle(server):
    with server.connect() as connection:
        connection.sendall(CLOSING_CHUNKED)
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"%x\r\n" % (2 * TOO_LARGE) + b"x" * TOO_LARGE)
        head, _ = read_answer(connection)
        assert int(head.split(maxsplit=2)[1]) == 413
        connection.sendall(b"x" * TOO_LARGE + b"\r\n0\r\n\r\n")
        while connection.recv(65536):  # a reset would raise
            pass


def test_the_connection_of_a_client_that_sends_no_more_of_a_body_is_closed(server):
    for headers, length in (((), 200_000), (("Expect: 100-continue",), 200_000), ((), TOO_LARGE)):
        with server.connect() as connection:
            connection.sendall(request_of(("/no", b""), *headers, length=length))
            head, _ = read_answer(connection)
            assert head.startswith(b"HTTP/1.1 4")
            assert read_all(connection) == b""


def test_an_upgrade_is_answered_as_any_other_request(server):
    for method, path, status in (("GET", "/health", 200), ("GET", "/no", 404), ("POST", "/v1/decisions", 422)):
        headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        assert server.client.request(method, path, headers=headers).status_code == status


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_server_that_cannot_wait_for_its_answers_says_so_to_each_client(tmp_path, numbers):
    server = ServerProcess(tmp_path, "1.0", "1")
    requests = [request_of(DECISION), request_of(CHAT), request_of(CHAT)[:-5], request_of(STREAM)]
    connections = [server.connect() for _ in requests]
    for connection, request in zip(connections, requests, strict=True):
        connection.sendall(request)
    wait_until(lambda: b"200 OK" in connections[-1].recv(65536, socket.MSG_PEEK))
    for number in numbers:
        server.process.send_signal(number)
        time.sleep(0.1)
    assert server.process.wait(20) == 0
    *whole, stream = [read_all(connection) for connection in connections]
    for received in whole:
        assert received.startswith(b"HTTP/1.1 503")
        assert b"the server is stopping" in received
    assert b"[DONE]" not in stream
    logged = server.log.read_text()
    assert "Traceback" not in logged
    assert len(logged.splitlines()) <= 2, logged
    server.client.close()


def test_small_answers_are_sent_at_once():
    """Without TCP_NODELAY each keep-alive answer waits about 40 ms for a delayed acknowledgement."""

    async def option() -> int:
        accepted = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(
            lambda reader, writer: accepted.set_result(writer.get_extra_info("socket")), sock=listen("127.0.0.1", 0)
        )
        _, client = await asyncio.open_connection(*server.sockets[0].getsockname())
        found = (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()
        server.close()
        return found

    assert asyncio.run(option())


def test_a_server_that_is_stopped_in_the_moment_in_which_it_names_its_address_stops(tmp_path):
    at_once = SERVER[2].replace("print(url, flush=True)", "signal.raise_signal(signal.SIGTERM)")
    command = [SERVER[0], "-c", f"import signal\n{at_once}", str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
