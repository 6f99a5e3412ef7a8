"""Whatever a library raises ends a command in one line, with an exit code that says whose fault it is."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_answers import answering
from small_project import PROJECT, environment

from twinloop.common.errors import UserError, is_disk_full, one_line
from twinloop.flows.edge import INTERRUPTED, MISTAKE, READER_LEFT, UNFORESEEN, explain, run_command


def raising(error: BaseException) -> BaseException:
    """The error as it is after it was raised."""
    try:
        raise error
    except BaseException as raised:
        return raised


def caused(outer: BaseException, cause: BaseException) -> BaseException:
    try:
        raise outer from cause
    except BaseException as raised:
        return raised


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/project/artifacts/x")
QUOTA = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/project/artifacts/x")
NAMED = [FULL, QUOTA, caused(RuntimeError("Task failed"), FULL), ExceptionGroup("tasks", [ValueError("other"), FULL])]
NAMELESS = [
    sqlite3.OperationalError("database or disk is full"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
]


def ended(error: BaseException) -> int:
    def command() -> int:
        raise error

    return run_command(command)


@pytest.mark.parametrize("error", NAMED, ids=str)
def test_a_full_disk_is_named_with_the_file(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(error) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("twinloop: /project/artifacts/x: the disk is full; free some space")
    assert said.count("\n") == 1


def test_a_full_disk_says_what_the_command_needs_where_it_is_known(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x"))
    error.add_note("a run of recipes/small.yaml writes about 70 MiB")
    said = str(explain(error, tmp_path))
    assert said.endswith(" MiB are free there; a run of recipes/small.yaml writes about 70 MiB)")


@pytest.mark.parametrize("error", NAMELESS, ids=str)
def test_a_full_disk_without_a_file_is_not_taken_for_one_with_room(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(explain(error, tmp_path)).startswith(
        f"a disk is full, and it is not that of {tmp_path}; free some space"
    )
    monkeypatch.setattr("twinloop.flows.edge.has_space", lambda path: False)
    assert str(explain(error, tmp_path)).startswith(f"{tmp_path}: the disk is full; free some space")


def test_a_copy_onto_a_full_disk_names_the_disk_that_is_full(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/figure.png", None, str(tmp_path / "figure.png"))
    assert str(explain(error, tmp_path)).startswith(f"{tmp_path / 'figure.png'}: the disk is full")


def test_what_fails_for_want_of_room_without_saying_so_is_a_full_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("Server error '500 Internal Server Error'")
    assert explain(error, tmp_path) is None
    monkeypatch.setattr("twinloop.flows.edge.has_space", lambda path: False)
    assert str(explain(error, tmp_path)).startswith(f"{tmp_path}: the disk is full (RuntimeError: Server error '500")
    assert explain(KeyError("a bug"), tmp_path) is None


def test_a_server_that_fails_on_a_full_disk_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    error = httpx.ReadError("the server has gone")
    assert "Prefect's server does not answer" in str(explain(error, tmp_path))
    monkeypatch.setattr("twinloop.flows.edge.has_space", lambda path: False)
    assert str(explain(error, tmp_path)).startswith(f"{tmp_path}: the disk is full")


def test_a_users_mistake_within_other_errors_is_what_is_said(tmp_path: Path) -> None:
    assert explain(caused(RuntimeError("Task failed"), UserError("say it better")), tmp_path) == "say it better"


def test_what_may_not_be_used_is_named(tmp_path: Path) -> None:
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "state"))
    assert str(explain(read_only, tmp_path)).startswith(f"{tmp_path / 'state'}: cannot be used (Read-only file system)")
    database = sqlite3.OperationalError("attempt to write a readonly database")
    assert str(explain(database, tmp_path)).startswith(f"{tmp_path}: a database cannot be used")
    below_a_file = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(tmp_path / "notes.txt" / "x"))
    assert str(explain(below_a_file, tmp_path)).startswith(f"{tmp_path / 'notes.txt' / 'x'}: a part of this path is a")


def during(outer: BaseException, inner: BaseException) -> BaseException:
    """The outer error, raised while the inner one was handled."""
    try:
        try:
            raise inner
        except BaseException:
            raise outer  # noqa: B904
    except BaseException as raised:
        return raised


@pytest.mark.parametrize(
    "error",
    [
        during(KeyError("a bug"), UserError("an old mistake")),
        during(RuntimeError("another"), UserError("an old mistake")),
        during(KeyError("a bug"), FULL),
        OSError(errno.EPERM, os.strerror(errno.EPERM)),
        RuntimeError("CUDA: permission denied by driver"),
        ModuleNotFoundError("No module named 'x'"),
    ],
    ids=str,
)
def test_a_bug_is_not_taken_for_a_users_mistake(error: BaseException, tmp_path: Path) -> None:
    assert explain(error, tmp_path) is None


@pytest.fixture
def in_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is a folder of a project."""
    (tmp_path / "params.yaml").touch()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "recipes")
    return tmp_path


def test_the_unforeseen_is_one_line_and_its_traceback_is_kept_in_the_project(
    in_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(ZeroDivisionError("division\nby zero")) == UNFORESEEN
    said = capsys.readouterr().err
    assert said.startswith("twinloop: unexpected ZeroDivisionError: division; please report it with ")
    assert said.count("\n") == 1
    kept = Path(said.rpartition(" ")[2].strip())
    assert kept.parent == in_project / "state" / "errors"
    assert "in command" in kept.read_text()


@pytest.fixture
def refusing() -> Iterator[str]:
    """The address of a server that knows nobody."""
    with answering(401) as address:
        yield address


def test_refused_credentials_name_the_server_and_what_to_set(
    refusing: str, in_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing)
    monkeypatch.setenv("PREFECT_API_URL", f"{refusing}/api")
    assert run_command(lambda: MlflowClient(refusing).get_run("x") and 0) == MISTAKE
    assert (
        f"{refusing}: MLflow's server refuses the credentials; set MLFLOW_TRACKING_USERNAME" in capsys.readouterr().err
    )

    def ask_prefect() -> int:
        with temporary_settings({PREFECT_API_URL: f"{refusing}/api"}), get_client(sync_client=True) as client:
            return len(client.read_flow_runs())

    assert run_command(ask_prefect) == MISTAKE
    assert f"{refusing}/api: Prefect's server refuses the credentials; set PREFECT_API_AUTH_" in capsys.readouterr().err


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(KeyboardInterrupt()) == INTERRUPTED
    assert capsys.readouterr().err == "twinloop: stopped\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("into", "code", "said"),
    [
        ("| head -1", READER_LEFT, ""),
        ("| true", READER_LEFT, ""),
        ("> /dev/full", MISTAKE, "a disk is full"),
        ("", 1, ""),
    ],
)
def test_output_that_nobody_takes_is_never_a_success(into: str, code: int, said: str, unbuffered: str) -> None:
    program = "from twinloop.flows.edge import run_command; import sys; " + (
        "sys.exit(run_command(lambda: (__import__('time').sleep(0.3), print('x\\n' * 10**5), 1)[-1]))"
    )
    line = f'"{sys.executable}" -c "{program}" {into}; exit ${{PIPESTATUS[0]}}'
    shell = environment() | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", line], cwd=PROJECT, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)


def test_a_broken_pipe_that_is_not_the_output_is_unforeseen(in_project: Path) -> None:
    assert ended(BrokenPipeError(errno.EPIPE, "Broken pipe")) == UNFORESEEN


def test_only_a_full_disk_is_one() -> None:
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(ValueError("no such space"))


def test_of_sqlalchemys_words_those_of_sqlite_are_said() -> None:
    from sqlalchemy.exc import OperationalError

    wrapped = OperationalError("SELECT 1", {}, sqlite3.OperationalError("database is locked"))
    assert one_line(wrapped) == "database is locked"
    assert one_line(caused(RuntimeError("(raised as a result of …)\nSELECT"), wrapped)) == "database is locked"
