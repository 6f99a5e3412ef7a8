"""Progress in Prefect costs the work nothing, also where Prefect's server is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID, uuid4

import pytest
from rich.console import Console

from twinloop.flows.progress import ReportedDisplay


class Quiet:
    """A display that shows nothing."""

    console = Console()

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *error: object) -> None: ...

    def started(self, stage: str) -> None: ...

    def stepped(self, stage: str, done: float, total: float, metrics: Mapping[str, float]) -> None: ...

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None: ...


class Prefect:
    """Takes artifacts in place of the server, each call as slow as it is told."""

    def __init__(self, patch: pytest.MonkeyPatch, answer: Callable[[], None] = lambda: None):
        self.calls: list[tuple[str, float, str]] = []
        self.threads: set[int] = set()
        self.answer = answer
        patch.setattr("prefect.artifacts.create_progress_artifact", self.create)
        patch.setattr("prefect.artifacts.update_progress_artifact", self.update)

    def create(self, progress: float, key: str, description: str) -> UUID:
        self.update(uuid4(), progress, description, key)
        return uuid4()

    def update(self, artifact: UUID, progress: float, description: str, key: str = "") -> None:
        self.threads.add(threading.get_ident())
        self.answer()
        self.calls.append((key, progress, description))


def work(display: Any, steps: int) -> None:
    display.started("my_sft-2")
    for step in range(1, steps + 1):
        display.stepped("my_sft-2", step, steps, {"loss": 1 / step})
    display.finished("my_sft-2", seconds=1.0, name="key")


def test_a_stage_is_one_artifact_that_ends_at_a_hundred_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    prefect = Prefect(monkeypatch)
    with ReportedDisplay(Quiet(), every_s=0.01) as display:
        work(display, 5)
        display.started("skipped")
        display.finished("skipped", seconds=None, name="key")
    created = [key for key, _, _ in prefect.calls if key]
    assert created == ["progress-my-sft-2"], "a key that Prefect takes"
    assert prefect.calls[-1][1:] == (100.0, "my_sft-2: 5/5  loss 0.200 (done in 1.0 s)")
    assert threading.get_ident() not in prefect.threads, "what trains asks no server"


def test_a_slow_server_holds_no_step_up_and_one_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        answer.wait(30)
        raise ConnectionError("gone")

    Prefect(monkeypatch, slow)
    with ReportedDisplay(Quiet(), every_s=0.01) as display:
        display.started("sft")
        assert asked.wait(30)
        work(display, 1000)  # while the server does not answer
        assert not answer.is_set()
        answer.set()
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
