"""A model is replaced while requests are in progress: no answer is cut off, and no request is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from served import DOMAIN, make_store, small_tokenizer
from test_scheduler import Gate, small_engine, wait_for

from twinloop.serving.decisions import DecisionService, ModelInfo
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler, SchedulerClosedError
from twinloop.serving.engine.stream import Stream
from twinloop.serving.model_manager import ModelManager, ServeFailure

LONG = SamplingParams(max_tokens=50)


@pytest.fixture
def service(tmp_path: Path) -> Callable[[str], DecisionService]:
    documents, tokenizer = make_store(tmp_path), small_tokenizer()

    def make(version: str) -> DecisionService:
        model = ModelInfo(name="returns", version=version, digest=version * 64)
        return DecisionService(Scheduler(small_engine(slots=2)), tokenizer, documents, model, DOMAIN)

    return make


def ask(service: DecisionService) -> tuple[str, Stream]:
    return service.model.version, service.scheduler.submit([1, 2], LONG)


def test_what_was_begun_ends_on_the_old_model_and_what_comes_goes_to_the_new(service, monkeypatch):
    gate = Gate(monkeypatch)
    old, new = service("1"), service("2")
    manager = ModelManager(old)
    manager.failure = ServeFailure("2", "it was corrupt")
    begun = [manager.submit(ask) for _ in range(4)]  # two of them wait for a slot
    manager.replace(new)
    assert manager.service is new
    later = manager.submit(ask)
    assert manager.failure is None
    assert manager.draining
    gate.opened.set()
    assert [version for version, _ in begun] == ["1"] * 4
    assert [len(list(stream)) for _, stream in begun] == [50] * 4
    assert (later[0], len(list(later[1]))) == ("2", 50)
    wait_for(lambda: not manager.draining)
    assert not old.scheduler.running
    assert new.scheduler.running
    new.scheduler.close()
    assert (manager.totals().finished, manager.totals().completion_tokens) == (5, 250)


def test_a_version_is_replaced_while_answers_of_two_before_it_go_on(service, monkeypatch):
    gate = Gate(monkeypatch)
    manager = ModelManager(service("1"))
    streams = [manager.submit(ask)]
    for version in ("2", "1"):  # promoted, and rolled back
        manager.replace(service(version))
        streams.append(manager.submit(ask))
    assert [version for version, _ in streams] == ["1", "2", "1"]
    assert manager.draining
    gate.opened.set()
    manager.close()
    assert [len(list(stream)) for _, stream in streams] == [50] * 3
    assert manager.totals().finished == 3


def test_a_request_that_meets_the_change_is_asked_again_of_the_new_model(service):
    manager = ModelManager(service("1"))
    new = service("2")

    def overtaken(now: DecisionService) -> tuple[str, Stream]:
        if now is not new:
            manager.replace(new)
        return ask(now)

    version, stream = manager.submit(overtaken)
    assert (version, len(list(stream))) == ("2", 50)
    new.scheduler.close()
    with pytest.raises(SchedulerClosedError):
        manager.submit(ask)
