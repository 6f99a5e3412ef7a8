"""Clients that cost little beside the server that they load: bytes over a connection each, until the server closes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil


class Answer(NamedTuple):
    """status: 0 where the server closed without an answer. head: in lower case."""

    status: int
    head: str
    body: str


class EngineServer:
    """`engine_server.py`, running."""

    def __init__(self, url: str, pid: int, log: Path):
        self.url, self.log = url, log
        self.port = int(url.rsplit(":", 1)[1])
        self.process = psutil.Process(pid)
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def queue(self) -> dict[str, int]:
        found: dict[str, int] = self.client.get("/health").json()["queue"]
        return found


@contextmanager
def engine_server(folder: Path, *, slots: int, queue_size: int) -> Iterator[EngineServer]:
    command = [sys.executable, "tests/serving/engine_server.py", str(folder), str(slots), str(queue_size)]
    log = folder / "log"
    paths = {"PYTHONPATH": os.pathsep.join(["tests", *filter(None, [os.environ.get("PYTHONPATH")])])}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=os.environ | paths, stdout=subprocess.PIPE, stderr=output, text=True)
    assert process.stdout is not None
    try:
        url, pid = process.stdout.readline().split()
        server = EngineServer(url, int(pid), log)
        with server.client:
            yield server
    finally:
        process.terminate()
        assert process.wait(60) == 0


def post(path: str, body: Any) -> bytes:
    """The bytes of a request; body: bytes are sent as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def ask(port: int, request: bytes, *, leave_after: int | None = None) -> Answer:
    """leave_after: bytes of the answer after which the client leaves; 0: as soon as it has asked."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        with suppress(ConnectionError):  # of a body that the server does not read
            writer.write(request)
            await writer.drain()
        with suppress(ConnectionError):
            while (leave_after is None or len(received) < leave_after) and (piece := await reader.read(65536)):
                received += piece
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    head, _, body = received.decode(errors="replace").partition("\r\n\r\n")
    return Answer(int(head.split(maxsplit=2)[1]) if head else 0, head.lower(), body)
