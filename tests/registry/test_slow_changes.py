"""What a server does at a change of its champion, or at its own end, though something takes its time or has failed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from releases import wait_for
from test_champion import CASE

from twinloop.common.errors import UserError
from twinloop.flows.serving import ServeSettings, _serve
from twinloop.registry.champion import Serving, follow_champion, following_champion, open_champion
from twinloop.registry.promotion import rollback
from twinloop.registry.snapshot import Version
from twinloop.registry.versions import Registry
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.errors import ENGINE_DIED


def test_a_champion_that_waits_for_the_memory_of_a_version_that_still_answers_says_so(
    project: Path, registry: Registry, release: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    release(1)
    goes_on = threading.Event()
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        # An answer of version 1 that takes its time.
        manager.service.scheduler._between_rounds(goes_on.wait)
        release(2)
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.service.model.version == "2"
        monkeypatch.setattr("twinloop.serving.engine.runner.available_bytes", lambda: 9_000)
        rollback(registry, "ada", lambda _: None)
        follow_champion(project, registry, manager, Serving(slots=1))
        assert manager.degraded()["champion_refused"] == (
            "version 1 is the champion, and version 2 answers: there is no memory for it before the version that was "
            "replaced has completed its last answers"
        )
        monkeypatch.undo()
        follow_champion(project, registry, manager, Serving(slots=1))
        assert (manager.service.model.version, manager.degraded(), manager.draining) == ("1", {}, True)
        goes_on.set()


def test_the_end_of_a_server_does_not_wait_for_a_registry_that_is_away(
    project: Path, registry: Registry, release: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    release(1)
    asked, answers = threading.Event(), threading.Event()
    monkeypatch.setattr("twinloop.registry.champion.LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(registry, "snapshot", lambda: (asked.set(), answers.wait(), 1 / 0))
    with open_champion(project, "returns", Serving(slots=1)) as manager:
        with following_champion(project, registry, manager, Serving(slots=1)):
            assert asked.wait(10)
            begun = time.monotonic()
        assert time.monotonic() - begun < 5
        answers.set()


def test_a_server_whose_engine_dies_says_so_and_ends(
    project: Path, release: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    release(1)
    ended = threading.Event()

    def answer(app: FastAPI, _: str) -> None:
        monkeypatch.setattr(Scheduler, "_round", lambda _: (_ for _ in ()).throw(MemoryError))
        client = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
        assert client.post("/v1/decisions", json=CASE).json()["reasons"][0]["predicate"] == "generation"
        wait_for(ended.is_set)
        for response in (client.post("/v1/decisions", json=CASE), client.get("/health"), client.get("/health/live")):
            assert (response.status_code, response.json()["error"]["message"]) == (503, ENGINE_DIED)

    settings = ServeSettings("returns", "127.0.0.1", 0, 1, 0, 1, [], 600.0)
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        with pytest.raises(UserError, match="engine has ended with an error"):
            _serve(project, settings, None, answer)
    finally:
        signal.signal(signal.SIGTERM, before)
