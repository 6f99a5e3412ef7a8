"""A request takes its place in the queue before anything is done for it, and gives it back whatever happens."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from served import CASE, HELLO, ReturnsAndChat, make_app, make_store, running, small_tokenizer, wait_until
from test_scheduler import Gate, small_engine
from test_structured import form_of
from test_structured import small_engine as engine_of

from twinloop.common.errors import UserError
from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import QueueFullError, Scheduler, SchedulerClosedError
from twinloop.serving.model_manager import ModelManager

PARAMS = SamplingParams(max_tokens=3)


class Counting(ReturnsAndChat):
    """Counts what is looked up, and fails at it where it is told to."""

    def __init__(self):
        self.queries = 0
        self.fails = False

    def query(self, request):
        self.queries += 1
        if self.fails:
            raise RuntimeError("broken")
        return super().query(request)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def scheduler():
    scheduler = Scheduler(small_engine(slots=1), queue_size=2)
    yield scheduler
    scheduler.close(drain=False, timeout_s=10)


@pytest.fixture
def served(tmp_path, tokenizer):
    """A server of three places, its domain and its scheduler."""
    domain, scheduler = Counting(), Scheduler(engine_of(tokenizer, slots=1), queue_size=2)
    with running(make_app(tmp_path, scheduler, tokenizer, domain=domain)) as client:
        yield client, domain, scheduler
    scheduler.close(drain=False, timeout_s=10)


def test_places_are_as_many_as_the_scheduler_holds(scheduler):
    places = [scheduler.reserve() for _ in range(3)]
    with pytest.raises(QueueFullError, match="try again"):
        scheduler.reserve()
    with pytest.raises(QueueFullError):
        scheduler.submit([1, 2], PARAMS)
    with places[0]:
        pass
    assert len(list(scheduler.submit([1, 2], PARAMS))) == 3


def test_the_scheduler_is_full_once_no_answer_has_a_place(scheduler):
    with scheduler.reserve(2):
        assert not scheduler.full
        with pytest.raises(QueueFullError):
            scheduler.reserve(2)
        with scheduler.reserve():
            assert scheduler.full
    assert not scheduler.full


def test_a_place_is_for_one_prompt(scheduler, monkeypatch):
    gate = Gate(monkeypatch)
    with scheduler.reserve() as place:
        (stream,) = place.submit([1, 2], PARAMS)
        with pytest.raises(AssertionError):
            place.submit([1, 2], PARAMS)
    others = [scheduler.reserve() for _ in range(2)]
    with pytest.raises(QueueFullError):
        scheduler.reserve()
    gate.opened.set()
    assert len(list(stream)) == 3
    for place in others:
        (stream,) = place.submit([1, 2], PARAMS)
        assert len(list(stream)) == 3


@pytest.mark.parametrize("prompt", [[], [10**6]])
def test_a_wrong_prompt_gives_its_place_back(scheduler, prompt):
    for _ in range(5):
        with pytest.raises(UserError), scheduler.reserve() as place:
            place.submit(prompt, PARAMS)
    assert len([scheduler.reserve() for _ in range(3)]) == 3


def test_a_place_taken_before_the_scheduler_closed_is_refused_afterwards(scheduler):
    with scheduler.reserve() as place:
        scheduler.close()
        with pytest.raises(SchedulerClosedError):
            place.submit([1, 2], PARAMS)


def test_requests_that_race_never_get_more_places_than_there_are(monkeypatch):
    gate = Gate(monkeypatch)  # no answer ends before the race does
    scheduler = Scheduler(small_engine(slots=2), queue_size=3)
    counting = threading.Lock()
    streams, held, most = [], 0, 0

    def ask(number: int) -> None:
        nonlocal held, most
        chance = random.Random(number)
        for attempt in range(4000):
            if attempt >= 40 and len(streams) >= scheduler.capacity:  # at random, beside other work, that may come late
                break
            with suppress(QueueFullError), scheduler.reserve() as place:
                with counting:
                    held += 1
                    most = max(most, held)
                time.sleep(chance.random() / 1000)
                with counting:
                    if chance.random() < 0.1:
                        streams.extend(place.submit([1, 2], PARAMS))
                    else:
                        held -= 1
            time.sleep(chance.random() / 1000)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(12)))
    assert most == len(streams) == scheduler.capacity
    with pytest.raises(QueueFullError):
        scheduler.reserve()
    gate.opened.set()
    assert [len(list(stream)) for stream in streams] == [3] * scheduler.capacity
    wait_until(lambda: scheduler.active == 0)
    assert len([scheduler.reserve() for _ in range(scheduler.capacity)]) == scheduler.capacity
    scheduler.close()


def test_a_full_queue_refuses_before_anything_is_looked_up_or_tokenised(served):
    client, domain, scheduler = served
    places = [scheduler.reserve() for _ in range(scheduler.capacity)]
    too_long = {"messages": [{"role": "user", "content": "long " * 9000}]}
    no_grammar = {"messages": HELLO, "response_format": form_of({"not": {}})}
    for path, body in (
        ("/v1/decisions", CASE),
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/chat/completions", too_long),
        ("/v1/chat/completions", no_grammar),
    ):
        response = client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert domain.queries == 0
    for place in places:
        with place:
            pass
    assert client.post("/v1/decisions", json=CASE).status_code == 200
    assert domain.queries == 1
    assert client.post("/v1/chat/completions", json=too_long).status_code == 400
    assert client.post("/v1/chat/completions", json=no_grammar).status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_request_for_more_answers_than_have_a_place_is_refused_whole(served, path):
    client, _, scheduler = served
    body = {"messages": HELLO} if "chat" in path else {"prompt": "a"}
    with scheduler.reserve(2):
        refused = client.post(path, json=body | {"max_tokens": 2, "n": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert client.post(path, json=body | {"max_tokens": 2}).status_code == 200


def test_what_fails_before_the_queue_gives_its_place_back(served):
    client, domain, scheduler = served
    domain.fails = True
    for _ in range(scheduler.capacity + 1):
        assert client.post("/v1/decisions", json=CASE).json()["reasons"][0]["predicate"] == "generation"
        for wrong in ({"max_tokens": 10**6}, {"response_format": form_of({"not": {}})}, {"tools": [{}]}):
            assert client.post("/v1/chat/completions", json={"messages": HELLO, **wrong}).status_code == 400
    assert len([scheduler.reserve() for _ in range(scheduler.capacity)]) == scheduler.capacity


def test_a_request_that_a_new_model_overtakes_is_answered_by_it(tmp_path, tokenizer):
    """Its place was with the model before, which closes while the request is prepared."""
    domain = Counting()
    first, second = (
        DecisionService(
            Scheduler(engine_of(tokenizer, slots=1)), tokenizer, make_store(tmp_path),
            ModelInfo(name="returns", version=version, digest=""), domain,
        )
        for version in "12"
    )  # fmt: skip
    manager = ModelManager(first)
    replaced = threading.Thread(target=manager.replace, args=(second,))
    look_up = domain.query

    def query(request):
        if not replaced.ident:
            replaced.start()
            replaced.join(10)
        return look_up(request)

    domain.query = query
    request = domain.request.model_validate(CASE)
    assert manager.submit(lambda service: service.begin(request)).finish().model.version == "2"
    assert domain.queries == 2
    second.scheduler.close()
