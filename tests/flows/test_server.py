"""A Prefect server that is not there is reported at once, and only a shared one counts jobs for others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from twinloop.common.errors import UserError
from twinloop.flows import server
from twinloop.flows.server import embedded_server, has_shared_server, wait_until_ready


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nothing listens, as PREFECT_API_URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    return url


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address that takes connections and says nothing, as PREFECT_API_URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        yield url


def test_a_server_that_refuses_is_reported_at_once(nobody: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with embedded_server(tmp_path):
        assert os.environ["PREFECT_API_URL"] == nobody
        with pytest.raises(UserError, match=r"Prefect's server does not answer .*refused.*unset PREFECT_API_URL"):
            wait_until_ready(tmp_path)
    assert time.monotonic() - started < 5


def test_a_server_that_dies_at_its_start_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    started = time.monotonic()
    with (
        embedded_server(tmp_path),
        pytest.raises(UserError, match=r"Prefect's server does not answer .*see .*server\.log"),
    ):
        wait_until_ready(tmp_path)
    assert time.monotonic() - started < 10


def test_a_dead_server_behind_a_silent_address_is_noticed(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinloop.flows.server.ASK_WITHIN_S", 0.2)
    dead = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    dead.wait()
    monkeypatch.setitem(server._own, silent, dead)
    with pytest.raises(UserError, match="does not answer"):
        wait_until_ready(tmp_path)


def test_only_a_server_of_others_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    # Prefect reads its settings once, when it is imported: here that was long ago.
    with temporary_settings({PREFECT_API_URL: "http://prefect.example/api"}):
        assert has_shared_server()
    with embedded_server(tmp_path), temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}):
        assert not has_shared_server()
    assert not has_shared_server()


# More than Prefect has sent by the time that the flow ends.
EMIT = """
import sys
from pathlib import Path
from twinloop.flows.environment import prepare_environment, quiet_prefect
quiet_prefect()
project = Path(sys.argv[1])
prepare_environment(project)
from twinloop.flows.server import embedded_server, wait_until_ready
with embedded_server(project):
    from prefect import flow
    from prefect.events import emit_event
    wait_until_ready(project)

    @flow
    def emit():
        for number in range(3000):
            emit_event("x.y", resource={"prefect.resource.id": f"x.{number}"})

    emit()
    if "die" in sys.argv:
        from twinloop.flows import server
        [child] = server._own.values()
        child.kill()
        child.wait()
"""


def emit(project: Path, *more: str) -> str:
    (project / "params.yaml").touch()
    shell = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-c", EMIT, str(project), *more]
    done = subprocess.run(command, cwd=project, env=shell, capture_output=True, text=True, timeout=180, check=True)
    return done.stderr


@pytest.mark.slow
def test_what_waits_to_be_sent_is_sent_before_the_server_ends(tmp_path: Path) -> None:
    assert emit(tmp_path) == ""


@pytest.mark.slow
def test_what_cannot_be_sent_any_more_costs_no_line(tmp_path: Path) -> None:
    assert emit(tmp_path, "die") == ""
