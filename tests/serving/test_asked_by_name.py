"""Versions on one base over HTTP: asked by name, loaded and dropped while the server runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapted import Exports, random_adapter
from served import CASE, DOMAIN, HELLO, make_store, running, small_tokenizer
from test_scheduler import Gate, wait_for

from twinloop.common.errors import UserError
from twinloop.models.adapter import Adapter
from twinloop.models.config import DecoderConfig
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving import named
from twinloop.serving.api import create_app
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine import Engine
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.named import NamedModels, NamedVersion, NotServedError

ADAPTERS = {number: (number, rank) for number, rank in ((1, 2), (2, 7), (3, 4), (4, 1))}
TEXT = {"prompt": "damaged items", "max_tokens": 12, "temperature": 0}


class Versions:
    """A registry of versions 1 to 4 of `returns`, which are adapters of several ranks on one base; 3 is served."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        self.read_ids: list[str] = []
        self.corrupt: set[str] = set()
        self.readable = threading.Event()
        self.readable.set()

    def adapter(self, number: int) -> Adapter:
        seed, rank = ADAPTERS[number]
        return random_adapter(seed, rank, self.config)

    def version(self, number: int) -> NamedVersion:
        return NamedVersion(
            f"returns:v{number}", ModelInfo(name="returns", version=str(number), digest=f"{number}" * 64)
        )

    def listed(self) -> Sequence[NamedVersion]:
        return [self.version(number) for number in sorted(ADAPTERS, reverse=True)]

    def find(self, name: str) -> NamedVersion:
        model, _, which = name.partition(":")
        number = {"champion": 3, "previous": 2}.get(which) or int(which.removeprefix("v") or 0)
        if model != "returns" or number not in ADAPTERS:
            raise NotServedError(f"{model} has no version {which}")
        return self.version(number)

    def read(self, version: NamedVersion) -> Adapter:
        self.read_ids.append(version.id)
        if version.id in self.corrupt:
            self.readable.wait(10)
            raise UserError("/secret/place: corrupt weights")
        return self.adapter(int(version.model.version))


class Serving:
    def __init__(self, client: httpx.Client, versions: Versions, manager: ModelManager):
        self.client, self.versions, self.manager = client, versions, manager

    def ask(self, model: str | None = None, **fields: Any) -> httpx.Response:
        named = {} if model is None else {"model": model}
        return self.client.post("/v1/completions", json=TEXT | named | fields)

    def held(self) -> list[str]:
        return [adapter.name for adapter in self.manager.service.scheduler.adapters.held]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> Exports:
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    return Exports(tmp_path_factory.mktemp("named"), config, tokenizer)


@pytest.fixture
def serving(tmp_path: Path, exports: Exports, tokenizer: ChatTokenizer) -> Iterator[Serving]:
    """Version 3, and at most two others beside it."""
    versions = Versions(exports.config)
    engine = Engine.load(exports.exported("served", versions.adapter(3)), slots=4, threads=1)
    scheduler = Scheduler(engine, draft_tokens=0)
    service = DecisionService(scheduler, tokenizer, make_store(tmp_path), versions.version(3).model, DOMAIN)
    manager = ModelManager(service, NamedModels(service, versions, most=2))
    with running(create_app(manager)) as client:
        yield Serving(client, versions, manager)
    scheduler.close(drain=False, timeout_s=10)


@pytest.fixture(scope="module")
def merged(exports: Exports, tokenizer: ChatTokenizer) -> Callable[[int], str]:
    """The greedy answer to TEXT of a version whose adapter is merged into its weights."""

    def answer(number: int) -> str:
        adapter = Versions(exports.config).adapter(number)
        engine = Engine.load(exports.exported(f"v{number}", adapter, adapters=False), slots=1, threads=1)
        from twinloop.serving.engine.sampling import SamplingParams

        params = SamplingParams(max_tokens=TEXT["max_tokens"], stop=tokenizer.stop_ids)
        tokens = engine.generate([tokenizer.encode_text(TEXT["prompt"])], params)[0].tokens
        return tokenizer.decode([token for token in tokens if token not in tokenizer.stop_ids])

    return answer


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_each_version_answers_by_its_name_as_its_merged_model(serving: Serving, merged: Callable[[int], str]) -> None:
    for name, number in ((None, 3), ("returns", 3), ("returns:v2", 2), ("returns:1", 1), ("returns:previous", 2)):
        answer = serving.ask(name)
        assert text_of(answer) == merged(number)
        assert answer.json()["system_fingerprint"] == f"{number}" * 64
    assert len({merged(number) for number in (1, 2, 3)}) == 3
    assert serving.versions.read_ids == ["returns:v2", "returns:v1"]  # each is loaded once


def test_answers_say_which_model_gave_them_and_the_served_one_keeps_its_name(serving: Serving) -> None:
    names = (None, "returns", "returns:v3", "returns:3", "returns:champion", "returns:v2", "returns:previous")
    assert [serving.ask(name).json()["model"] for name in names] == ["returns"] * 5 + ["returns:v2"] * 2
    chat = {"messages": HELLO, "max_tokens": 3, "model": "returns:v2"}
    assert serving.client.post("/v1/chat/completions", json=chat).json()["model"] == "returns:v2"
    decision = serving.client.post("/v1/decisions?model=returns:v2", json=CASE).json()
    assert decision["model"] == {"name": "returns", "version": "2", "digest": "2" * 64}
    assert serving.client.post("/v1/decisions", json=CASE).json()["model"]["version"] == "3"


def test_models_lists_what_can_be_asked_and_says_each_alone(serving: Serving) -> None:
    listed = serving.client.get("/v1/models").json()["data"]
    assert [each["id"] for each in listed] == ["returns", "returns:v4", "returns:v2", "returns:v1"]
    assert [each["version"] for each in listed] == ["3", "4", "2", "1"]
    for each in listed:
        assert serving.client.get(f"/v1/models/{each['id']}").json() == each
        assert serving.ask(each["id"]).json()["model"] == each["id"]


def test_a_name_of_no_model_is_a_404_in_openais_form(serving: Serving) -> None:
    refused = serving.ask("returns:v9")
    assert refused.status_code == 404
    assert refused.json()["error"] == {
        "message": "model: 'returns:v9' is not served here; returns has no version v9",
        "type": "invalid_request_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip
    body = {"prompt": "a", "model": "tickets:1"}
    for path, asked in (("/v1/completions", TEXT | body), ("/tokenize", body)):
        assert serving.client.post(path, json=asked).json()["error"]["code"] == "model_not_found"
    assert serving.client.get("/v1/models/returns:v9").status_code == 404
    assert serving.client.post("/v1/decisions?model=returns:v9", json=CASE).status_code == 404
    assert serving.client.post("/tokenize", json={"prompt": "a", "model": "returns:v2"}).status_code == 200
    assert serving.held() == []  # nothing was loaded to count tokens


def test_a_request_that_is_refused_for_what_it_asks_loads_nothing(serving: Serving) -> None:
    for fields in ({"unheard_of": 1}, {"n": 100}):
        assert serving.ask("returns:v2", **fields).status_code == 400
    assert (serving.held(), serving.versions.read_ids) == ([], [])


def test_the_one_used_longest_ago_makes_space_unless_it_answers(
    serving: Serving, merged: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 1, 4):
        serving.ask(f"returns:v{number}")
        wait_for(lambda: serving.manager.service.scheduler.active == 0)
    assert serving.held() == ["returns:v1", "returns:v4"]
    gate = Gate(monkeypatch)
    with (
        serving.client.stream("POST", "/v1/completions", json=TEXT | {"model": "returns:v1", "stream": True}) as one,
        serving.client.stream("POST", "/v1/completions", json=TEXT | {"model": "returns:v4", "stream": True}) as two,
    ):
        full = serving.ask("returns:v2")
        assert (full.status_code, full.json()["error"]["code"], full.headers["Retry-After"]) == (429, "queue_full", "1")
        assert full.json()["error"]["message"] == (
            "model: returns:v2 is not loaded, and 2 others are in use; try again soon"
        )
        gate.opened.set()
        assert [each.read().endswith(b"data: [DONE]\n\n") for each in (one, two)] == [True, True]
    wait_for(lambda: serving.manager.service.scheduler.active == 0)
    assert text_of(serving.ask("returns:v2")) == merged(2)


def test_a_version_that_does_not_load_says_nothing_of_the_servers_files_and_the_others_go_on(
    serving: Serving, merged: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "AGAIN_AFTER_S", 0.0)
    serving.versions.corrupt.add("returns:v2")
    refused = serving.ask("returns:v2")
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "model: returns:v2 does not load; the server's log gives the reason"
    assert text_of(serving.ask("returns:v1")) == merged(1)
    serving.versions.corrupt.clear()
    assert text_of(serving.ask("returns:v2")) == merged(2)


def test_who_waits_for_a_version_holds_nobody_else_up_and_it_is_read_once(serving: Serving) -> None:
    versions, scheduler = serving.versions, serving.manager.service.scheduler
    versions.corrupt = {"returns:v1"}
    versions.readable.clear()
    waiting = 45  # more than the threads that probes share
    with ThreadPoolExecutor(waiting) as clients:
        asked = [clients.submit(serving.ask, "returns:v1") for _ in range(waiting)]
        try:
            wait_for(lambda: scheduler._reserved == waiting)
            assert serving.client.get("/health/live").status_code == 200
            assert serving.ask().status_code == 200
        finally:
            versions.readable.set()
        assert {each.result().status_code for each in asked} == {503}
    assert serving.ask("returns:v1").status_code == 503
    assert versions.read_ids.count("returns:v1") == 1


def test_a_version_is_not_read_for_a_request_that_has_no_place(serving: Serving) -> None:
    scheduler = serving.manager.service.scheduler
    with scheduler.reserve(scheduler.capacity - 1):
        assert serving.ask("returns:v1", n=2).status_code == 429
    assert "returns:v1" not in serving.versions.read_ids


def test_without_memory_idle_ones_make_space_and_else_it_is_a_503(
    serving: Serving, merged: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.ask("returns:v1")
    wait_for(lambda: serving.manager.service.scheduler.active == 0)
    place = "twinloop.serving.engine.adapters.available_bytes"
    monkeypatch.setattr(place, lambda: 0 if serving.held() else 2**40)
    assert text_of(serving.ask("returns:v4")) == merged(4)
    assert serving.held() == ["returns:v4"]
    monkeypatch.setattr(place, lambda: 0)
    refused = serving.ask("returns:v2")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert refused.json()["error"]["message"] == "model: there is no memory for returns:v2 now; try again soon"


def test_metrics_are_labelled_with_the_model_that_answered(serving: Serving) -> None:
    for name in ("returns", "returns:v2", "returns:v2"):
        serving.ask(name)
    lines = serving.client.get("/metrics").text.splitlines()

    def value(metric: str, model: str) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{metric}{{") and f'"{model}"' in line)

    for metric in ("twinloop:request_success_total", "twinloop:time_to_first_token_seconds_count"):
        assert (value(metric, "returns"), value(metric, "returns:v2")) == (1, 2)
    assert value("twinloop:generation_tokens_total", "returns") == 3 * TEXT["max_tokens"]  # of all on the base together
    assert "twinloop_adapters_loaded 1.0" in lines
