"""Who is next in the queue: by priority, then by arrival, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from served import CASE, HELLO, make_app, running, small_tokenizer
from test_scheduler import Gate, prompt_of, small_engine, wait_for
from test_structured import small_engine as engine_of

from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.engine.stream import Stream
from twinloop.serving.engine.waiting import MOST_OVERTAKEN

Order = Callable[..., list[int]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Order:
    """In which order requests of these priorities get the only slot, all of them waiting before the first does."""

    def order(priorities: Sequence[int], answers: Sequence[int] = ()) -> list[int]:
        gate, begun = Gate(monkeypatch), list[int]()
        scheduler = Scheduler(small_engine(slots=1), queue_size=100)
        first = scheduler.submit([1], SamplingParams(max_tokens=3))
        wait_for(lambda: scheduler.active == 1)
        numbers: dict[Stream, int] = {}
        for number, priority in enumerate(priorities):
            count = answers[number] if answers else 1
            with scheduler.reserve(count) as place:
                streams = place.submit(prompt_of(number, 5), SamplingParams(max_tokens=2), priority=priority)
            numbers |= dict.fromkeys(streams, number)
        started = Stream.started
        monkeypatch.setattr(Stream, "started", lambda stream: begun.append(numbers[stream]) or started(stream))
        gate.opened.set()
        assert [len(list(stream)) for stream in (first, *numbers)] == [3, *[2] * len(numbers)]
        scheduler.close()
        return begun

    return order


def test_the_lowest_priority_is_next_and_of_equal_ones_the_first_to_come(taken: Order) -> None:
    assert taken([0, 5, -1, 0, 5, -1, -(10**30), 0]) == [6, 2, 5, 0, 3, 7, 1, 4]


def test_without_priorities_the_order_is_that_of_arrival(taken: Order) -> None:
    assert taken([0] * 20) == [*range(20)]


def test_who_waits_longest_gets_one_place_of_eight(taken: Order) -> None:
    low, high = 3, 4 * MOST_OVERTAKEN
    order = taken([9] * low + [0] * high)
    assert [order.index(number) for number in range(low)] == [
        (number + 1) * (MOST_OVERTAKEN + 1) - 1 for number in range(low)
    ]
    assert [number for number in order if number >= low] == [*range(low, low + high)]


def test_all_answers_of_a_request_have_its_priority(taken: Order) -> None:
    assert taken([0, -1, 0], answers=[1, 3, 2]) == [1, 1, 1, 0, 2, 2]


def test_a_decision_has_its_priority_beside_its_model(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_tokenizer()
    scheduler, seen = Scheduler(engine_of(tokenizer, slots=2)), list[int]()
    started = Stream.started
    monkeypatch.setattr(Stream, "started", lambda stream: seen.append(stream.priority) or started(stream))
    with running(make_app(tmp_path, scheduler, tokenizer)) as client:
        for query in ("", "?priority=-3"):
            assert client.post(f"/v1/decisions{query}", json=CASE).status_code == 200
        refused = client.post("/v1/decisions?priority=soon", json=CASE)
    scheduler.close(drain=False, timeout_s=10)
    assert seen == [0, -3]
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "query.priority")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_request_says_its_priority(tmp_path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    tokenizer = small_tokenizer()
    scheduler, seen = Scheduler(engine_of(tokenizer, slots=2)), list[int]()
    started = Stream.started
    monkeypatch.setattr(Stream, "started", lambda stream: seen.append(stream.priority) or started(stream))
    body = {"messages": HELLO} if "chat" in path else {"prompt": ["a", "b"]}
    with running(make_app(tmp_path, scheduler, tokenizer)) as client:
        for priority in ({}, {"priority": -3}):
            assert client.post(path, json=body | {"max_tokens": 2} | priority).status_code == 200
        refused = client.post(path, json=body | {"priority": 1.5})
    scheduler.close(drain=False, timeout_s=10)
    count = 1 if "chat" in path else 2
    assert seen == [0] * count + [-3] * count
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
