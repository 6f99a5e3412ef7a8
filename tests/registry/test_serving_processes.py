"""`twinloop serve --workers`: every process follows the champion, and memory and cores are those of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from releases import serving, wait_for

from twinloop.common.errors import UserError
from twinloop.models.exported import read_exported
from twinloop.models.memory import serving_memory
from twinloop.registry.champion import Serving, follow_champion, open_champion
from twinloop.registry.snapshot import Version
from twinloop.registry.versions import Registry
from twinloop.serving.engine import Engine
from twinloop.serving.engine.session import usable_cores

CASE = {
    "order": {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12},
    "message": "my label has already been created, confirm it.",
}


def test_a_promotion_reaches_every_process_and_one_that_takes_the_place_of_another(
    project: Path, release: Callable[..., Version]
) -> None:
    release(1)
    with serving(project, "--workers", "2") as (client, server):

        def versions(count: int = 20) -> set[str]:
            """That answer, each time on a new connection, which either process may accept."""
            answers = [httpx.post(f"{client.base_url}/v1/decisions", json=CASE, timeout=120) for _ in range(count)]
            assert {answer.status_code for answer in answers} == {200}
            return {answer.json()["model"]["version"] for answer in answers}

        assert versions() == {"1"}
        release(2)
        wait_for(lambda: versions() == {"2"})
        workers = psutil.Process(server.pid).children()
        assert len(workers) == 2
        workers[0].kill()
        wait_for(lambda: "twinloop_workers_replaced_total 1.0" in client.get("/metrics").text.splitlines())
        wait_for(lambda: "twinloop_workers 2.0" in client.get("/metrics").text.splitlines())
        assert versions() == {"2"}
    log = (project / "serve.log").read_text()
    assert log.count("returns version 2 answers now") == 2
    assert log.count("another one takes its place") == 1
    assert "Traceback" not in log


def test_all_processes_must_fit_into_memory(
    project: Path, registry: Registry, release: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    exported, config = read_exported(release(1).path)
    plan = serving_memory(config, precision=exported.precision, slots=1, max_length=exported.max_length)
    monkeypatch.setattr("twinloop.serving.engine.runner.available_bytes", lambda: 5 * plan.total_bytes // 2)
    first, later = SimpleNamespace(count=3, starting=3), SimpleNamespace(count=3, starting=1)
    with (
        pytest.raises(UserError, match=r"in 3 processes needs .*MiB of memory \(in each: .*take fewer processes"),
        open_champion(project, "returns", Serving(slots=1, process=first)),
    ):
        pass
    with open_champion(project, "returns", Serving(slots=1, process=later)) as manager:  # the others hold theirs
        release(2)
        follow_champion(project, registry, manager, Serving(slots=1, process=later))
        assert manager.failure is not None
        assert "in 3 processes needs" in manager.failure.reason
        monkeypatch.setattr("twinloop.serving.engine.runner.available_bytes", lambda: 3 * plan.total_bytes)
        follow_champion(project, registry, manager, Serving(slots=1, process=later))
        assert manager.service.model.version == "2"


@pytest.mark.parametrize(("count", "threads"), [(1, usable_cores()), (2, max(1, usable_cores() // 2)), (64, 1)])
def test_processes_share_the_cores(
    project: Path, release: Callable[..., Version], monkeypatch: pytest.MonkeyPatch, count: int, threads: int
) -> None:
    release(1)
    asked, load = [], Engine.load
    monkeypatch.setattr(Engine, "load", lambda *given, **more: asked.append(more["threads"]) or load(*given, **more))
    with open_champion(project, "returns", Serving(slots=1, process=SimpleNamespace(count=count, starting=1))):
        assert asked == [threads]
