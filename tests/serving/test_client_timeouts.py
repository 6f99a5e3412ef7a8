"""A request ends when its client waits no longer, as OpenAI's clients say in a header: in the queue, and in a slot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from served import CASE, GOOD, HELLO, ScriptedScheduler, make_app, running, small_tokenizer, wait_until
from test_scheduler import Gate
from test_structured import small_engine

from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.metrics import ASKED

PYTHONS, JAVASCRIPTS = "x-stainless-read-timeout", "x-stainless-timeout"
CHAT = "/v1/chat/completions"
BODIES = {"/v1/decisions": CASE, CHAT: {"messages": HELLO}, "/v1/completions": {"prompt": "a", "max_tokens": 300}}
ENDLESS = {"max_tokens": 1500, "ignore_eos": True}
EXCEEDED = (504, "server_error", "deadline_exceeded")


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """A real engine of one slot."""
    scheduler = Scheduler(small_engine(small_tokenizer(), slots=1))
    yield scheduler
    scheduler.close(drain=False, timeout_s=20)


@pytest.fixture
def client(tmp_path: Path, scheduler: Scheduler) -> Iterator[httpx.Client]:
    with running(make_app(tmp_path, scheduler, small_tokenizer())) as client:
        yield client


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[httpx.Client, ScriptedScheduler]]:
    """A model that takes 0.05 s a token, and some seconds for its answer."""
    scheduler = ScriptedScheduler(small_tokenizer(), delay_s=0.05)
    with running(make_app(tmp_path, scheduler, small_tokenizer())) as client:
        yield client, scheduler


def ended(answer: httpx.Response) -> tuple[int, str, str]:
    """The status and the error of an answer."""
    error = answer.json()["error"]
    return answer.status_code, error["type"], error["code"]


def events_of(answer: httpx.Response) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_leaves_the_queue_when_its_client_waits_no_longer_and_others_go_on(
    client: httpx.Client, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    gate, body = Gate(monkeypatch), {"messages": HELLO, "max_tokens": 5, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, CHAT, json=body)
        wait_until(lambda: scheduler.active == 1)
        queued = client.post(CHAT, json=body | {"stream": stream}, headers={PYTHONS: "1"})
        assert not first.done()
        gate.opened.set()
        (choice,) = first.result().json()["choices"]
    assert choice["finish_reason"] == "length"
    if stream:
        begun, last = events_of(queued)
        assert begun["choices"][0]["delta"]["role"] == "assistant"
        assert last["error"]["code"] == "deadline_exceeded"
    else:
        assert ended(queued) == EXCEEDED
        assert "nothing could be sent for 1 s" in queued.json()["error"]["message"]
    wait_until(lambda: (scheduler.queued, scheduler.active) == (0, 0))
    totals = scheduler.metrics().totals
    assert (totals.finished, totals.cancelled, totals.completion_tokens) == (1, 1, 5)


@pytest.mark.parametrize("path", sorted(set(ASKED) - {"/v1/classify"}))
def test_an_answer_that_is_being_written_ends_too(slow: tuple[httpx.Client, ScriptedScheduler], path: str) -> None:
    client, scheduler = slow
    assert ended(client.post(path, json=BODIES[path], headers={PYTHONS: "0.3"})) == EXCEEDED
    assert scheduler.streams[-1].cancelled.is_set()


def test_a_time_without_its_fraction_ends_no_request_too_early(slow: tuple[httpx.Client, ScriptedScheduler]) -> None:
    answer = slow[0].post(CHAT, json=BODIES[CHAT], headers={JAVASCRIPTS: "1"})
    assert ended(answer) == EXCEEDED
    assert "for 2 s" in answer.json()["error"]["message"]


def test_a_stream_may_take_longer_than_its_client_waits_for_each_piece(
    slow: tuple[httpx.Client, ScriptedScheduler],
) -> None:
    official = openai.OpenAI(base_url=f"{slow[0].base_url}/v1", api_key="none", max_retries=0, timeout=1.5)
    chunks = official.chat.completions.create(model="returns", messages=HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GOOD
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
        official.chat.completions.create(model="returns", messages=HELLO)


def test_the_official_clients_timeout_frees_the_slot(
    client: httpx.Client, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):  # whoever is first, it or the server
        official.chat.completions.create(model="returns", messages=HELLO, extra_body=ENDLESS, timeout=1)
    assert 'twinloop:num_requests_running{model_name="returns"} 1.0' in client.get("/metrics").text
    gate.opened.set()
    wait_until(lambda: 'twinloop:num_requests_running{model_name="returns"} 0.0' in client.get("/metrics").text)
    assert 'request_success_total{finished_reason="abort",model_name="returns"} 1.0' in client.get("/metrics").text
    totals = scheduler.metrics().totals
    assert totals.cancelled == 1
    assert totals.completion_tokens <= 2


@pytest.mark.parametrize("header", [PYTHONS, JAVASCRIPTS])
@pytest.mark.parametrize("value", ["", "0", "-5", "nan", "inf", "1e999", "soon", "5 s", "0x1", "９", "None"])
def test_what_is_no_time_is_ignored(scripted: httpx.Client, header: str, value: str) -> None:
    answer = scripted.post(CHAT, json=BODIES[CHAT], headers={header: value.encode()})
    assert answer.status_code == 200


def test_a_client_that_waits_longer_than_the_server_lets_it_gets_the_servers_limit(tmp_path: Path) -> None:
    scheduler = ScriptedScheduler(small_tokenizer(), delay_s=0.05)
    with running(make_app(tmp_path, scheduler, small_tokenizer(), deadline_s=0.5)) as client:
        answer = client.post(CHAT, json=BODIES[CHAT], headers={PYTHONS: "600"})
    assert ended(answer) == EXCEEDED
    assert "0.5 s, which is this server's limit" in answer.json()["error"]["message"]


def test_a_client_that_waits_a_short_time_gets_what_takes_none_of_the_models(scripted: httpx.Client) -> None:
    assert scripted.get("/health", headers={PYTHONS: "1e-9"}).status_code == 200
