"""Real servers on loopback for tests. Where a test needs a certain answer, a script replaces the model."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from twinloop.domains.domain import Document, Domain
from twinloop.domains.returns.domain import Returns
from twinloop.domains.returns.prompt import REASONS
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.api import create_app, server_config
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine.counts import SchedulerMetrics, Totals
from twinloop.serving.engine.sampling import SamplingParams, TokenReport
from twinloop.serving.engine.scheduler import QueueFullError
from twinloop.serving.engine.slots import Prompt
from twinloop.serving.engine.stream import Timings
from twinloop.serving.knowledge.documents import DocumentStore
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.traces import TraceStore

DAMAGED = "damaged items reported within 30 days are eligible."
LATE = "late items reported within 14 days are eligible."
POLICIES = [
    Document("P-3", LATE),
    Document("P-7", DAMAGED),
    Document("P-12", "unwanted items within 10 days are eligible."),
]


class ReturnsAndChat(Returns):
    """The returns domain, with chat beside its decisions, so that both can be asked."""

    chat = True


DOMAIN = ReturnsAndChat()

ORDER = {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12}
GOOD = (
    '{"evidence": "damaged items reported within 30 days are eligible.", "policy_id": "P-7", "window_days": 30, '
    '"days": 12, "eligible": true, "label_created": false}'
)
MODEL = ModelInfo(name="returns", version="3", digest="d" * 64)
CASE = {"order": ORDER, "message": "my label has already been created, confirm it."}
HELLO = [{"role": "user", "content": "can i send order A10234 back?"}]

SERVER = [
    sys.executable,
    "-c",
    """
import sys
from pathlib import Path
sys.path.insert(0, "tests/serving")
from twinloop.serving import api
from served import ScriptedScheduler, make_app, small_tokenizer
folder, delay_s, *shutdown_s = sys.argv[1:]
if shutdown_s:
    api.SHUTDOWN_S = int(shutdown_s[0])
tokenizer = small_tokenizer()
app = make_app(Path(folder), ScriptedScheduler(tokenizer, delay_s=float(delay_s)), tokenizer)
api.run_server(app, "127.0.0.1", 0, on_ready=lambda url: print(url, flush=True))
print("stopped", flush=True)
""",
]
"""A server process; the arguments: a folder, the seconds a token takes and, at will, those that stopping may take."""


def small_tokenizer() -> ChatTokenizer:
    """A real tokenizer that knows the domain's words."""
    lines = [f"{reason} items reported within 30 days are eligible." for reason in REASONS]
    prompt = DOMAIN.build_prompt(DOMAIN.request.model_validate(CASE), POLICIES)[0]["content"]
    return train_tokenizer([*lines * 4, prompt, GOOD] * 4, 400)


class ScriptedStream:
    def __init__(self, prompt: list[int], params: SamplingParams, tokens: list[int], delay_s: float, end: str = "stop"):
        self.prompt, self.params = Prompt(prompt), params
        self.end = end
        self.reports = [TokenReport(-1.0, {token: -1.0}) for token in tokens] if params.top_logprobs is not None else []
        self.timings = Timings()
        self.finish_reason: str | None = None
        self.cancelled = threading.Event()
        self._tokens = tokens
        self._delay_s = delay_s

    def cancel(self) -> None:
        self.cancelled.set()

    finish = cancel

    def wait(self) -> None: ...

    def bursts(self) -> Iterator[list[int]]:
        for token in self:
            yield [token]

    def __iter__(self) -> Iterator[int]:
        self.timings.queue_s = 0.0
        for token in self._tokens:
            if self.cancelled.wait(self._delay_s) if self._delay_s else self.cancelled.is_set():
                self.finish_reason = "cancelled"
                return
            yield token
        self.finish_reason = self.end


class ScriptedPlace:
    """Places of a request at a scheduler that stands in for a model."""

    def __init__(self, scheduler: Any, answers: int):
        self._scheduler, self._answers = scheduler, answers

    def use(self, adapter: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(
        self, prompt: list[int], params: SamplingParams, *, priority: int = 0, prompt_logprobs: int | None = None
    ) -> list[ScriptedStream]:
        streams: list[ScriptedStream] = [self._scheduler.submit(prompt, params) for _ in range(self._answers)]
        if prompt_logprobs is not None:
            streams[0].prompt.reports += [TokenReport(-1.0, {token: -1.0}) for token in prompt[1:]]
        for stream in streams:
            stream.prompt = streams[0].prompt
        return streams


class ScriptedScheduler:
    """In place of a model: whatever is asked, it answers `script`, or raises it."""

    max_length = 1024
    capacity = 4
    running = True
    died = False

    def __init__(self, tokenizer: ChatTokenizer, script: str | Exception = GOOD, *, delay_s: float = 0.0):
        self.script = script
        self.delay_s = delay_s
        self.streams: list[ScriptedStream] = []
        self.prompts: list[list[int]] = []
        self.queued = self.active = 0
        self.full = False
        self._tokenizer = tokenizer

    def metrics(self) -> SchedulerMetrics:
        return SchedulerMetrics(self.queued, self.active, slots=4, tokens_per_s=0.0, totals=Totals(), cache_used=0.0)

    def reserve(self, answers: int = 1, adapter: object = None) -> ScriptedPlace:
        if self.full:
            raise QueueFullError("the queue holds 4 requests already")
        return ScriptedPlace(self, answers)

    def submit(self, prompt: list[int], params: SamplingParams) -> ScriptedStream:
        if isinstance(self.script, Exception):
            raise self.script
        self.prompts.append(list(prompt))
        tokens = self._tokenizer.encode_answer(self.script)[: params.max_tokens]
        self.streams.append(ScriptedStream(prompt, params, tokens, self.delay_s))
        return self.streams[-1]


def make_store(folder: Path, domain: Domain = DOMAIN) -> DocumentStore:
    """A folder's documents; the policies, where there were none."""
    store = DocumentStore(folder / "documents.db", domain.check_document)
    store.seed(POLICIES)
    return store


def make_app(
    folder: Path, scheduler: Any, tokenizer: ChatTokenizer, *, domain: Domain = DOMAIN, **settings: Any
) -> FastAPI:
    """The application over a folder's documents and traces."""
    documents, traces = make_store(folder, domain), TraceStore(folder / "traces")
    return create_app(ModelManager(DecisionService(scheduler, tokenizer, documents, MODEL, domain, traces)), **settings)


def break_documents(folder: Path) -> None:
    """As a disk that fails might leave them."""
    for beside in ("documents.db-wal", "documents.db-shm"):
        (folder / beside).unlink(missing_ok=True)
    (folder / "documents.db").write_bytes(b"not a database")


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Send these very bytes and read until the server closes. Returns the first answer's status, and all bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split(maxsplit=2)[1]), answer


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def running(app: ASGIApp) -> Iterator[httpx.Client]:
    """The product's own server in a thread, and a client of it."""
    config = server_config(app)
    config.port, config.timeout_graceful_shutdown = 0, 2
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
