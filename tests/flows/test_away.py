"""MLflow's server or database is away, broken or locked: every command says so in one line, and soon."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from http_answers import answering
from small_project import environment, make_ready_project, twinloop

from twinloop.common.errors import UserError
from twinloop.flows.edge import MISTAKE, run_command
from twinloop.registry import database, snapshot
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import Registry

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def failing() -> Iterator[str]:
    """The address of a server that answers 500 to everything."""
    with answering(500) as address:
        yield address


@pytest.mark.parametrize("status", [200, 404])
def test_a_server_that_is_not_mlflow_is_named(
    status: int, registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(status, b"<h1>another program</h1>", "text/html") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert run_command(lambda: registry.snapshot() and 0) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith(f"twinloop: {address}: MLflow's server does not answer as it should")
    assert said.count("\n") == 1


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setattr(database, "BUSY_FOR_S", 0.3)
    monkeypatch.setattr(snapshot, "BUSY_FOR_S", 0.3)
    return Registry(Mlruns(tmp_path / "mlruns"), "small")


@pytest.mark.parametrize("answer", ["nobody", "500"])
def test_a_server_that_is_away_or_broken_is_named(
    answer: str,
    failing: str,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, reason = (
        (NOBODY, "Connection refused") if answer == "nobody" else (failing, "too many 500 error responses")
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("://", "://me:secret@"))
    assert run_command(lambda: registry.snapshot() and 0) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith(f"twinloop: {address}: MLflow's server does not answer as it should")
    assert reason in said
    assert "unset MLFLOW_TRACKING_URI" in said
    assert "secret" not in said
    assert said.count("\n") == 1


def test_a_server_is_given_up_soon_unless_the_user_has_said_when(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    assert registry.mlruns.client
    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 2
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 600


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.slow
def test_a_locked_database_is_named_and_one_that_is_soon_free_is_waited_for(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry.mlruns.client.create_registered_model("small")
    with locked(registry.mlruns.database):
        for ask in (registry.snapshot, Mlruns(registry.mlruns.root).prepare_database):
            with pytest.raises(UserError, match=r"mlflow\.db: another process has held its lock for"):
                ask()
        # in the midst of a command, MLflow's own error
        assert run_command(lambda: registry.mlruns.client.set_registered_model_tag("small", "a", "b")) == MISTAKE
    assert "another process keeps a database locked" in capsys.readouterr().err
    monkeypatch.setattr(snapshot, "BUSY_FOR_S", 30)
    monkeypatch.setattr(database, "BUSY_FOR_S", 30)
    with closing(sqlite3.connect(registry.mlruns.database, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(1.0, lambda: other.execute("ROLLBACK")).start()
        assert registry.snapshot().versions == {}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ready_project(tmp_path_factory.mktemp("project"))


COMMANDS = {
    "status": ["status"],
    "promote": ["promote", "1"],
    "rollback": ["rollback"],
    "serve": ["serve", "--port", "0"],
    "decide": ["decide", "--json", "{}"],
    "gate": ["gate"],
    "documents": ["documents", "list"],
    "run": ["run"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_in_one_line(command: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("small_project.environment", lambda: environment() | {"MLFLOW_TRACKING_URI": NOBODY})
    done = twinloop(project, *COMMANDS[command])
    assert done.returncode == MISTAKE
    assert "MLflow's server does not answer as it should (Connection refused)" in done.stderr
    assert done.stderr.count("\n") == 1
