"""Whatever a library raises ends a command in one line, with an exit code that says whose fault it is."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from small_project import PROJECT, environment

from common.errors import UserError, is_disk_full, one_line
from flows.edge import INTERRUPTED, MISTAKE, UNFORESEEN, explain, run_command


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
FOREIGN = [
    FULL,
    caused(RuntimeError("Task failed"), FULL),
    ExceptionGroup("tasks", [ValueError("other"), FULL]),
    sqlite3.OperationalError("database or disk is full"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
]


@pytest.mark.parametrize("error", FOREIGN, ids=str)
def test_a_full_disk_is_recognised_however_it_is_said(
    error: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise error

    assert run_command(command, project=tmp_path) == MISTAKE
    said = capsys.readouterr().err
    assert "the disk is full (" in said
    assert "MiB are free); make room" in said
    assert said.count("\n") == 1


def test_a_users_mistake_within_other_errors_is_what_is_said(tmp_path: Path) -> None:
    assert explain(caused(RuntimeError("Task failed"), UserError("say it better")), tmp_path) == "say it better"


def test_what_may_not_be_written_is_named(tmp_path: Path) -> None:
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "state"))
    assert str(tmp_path / "state") in str(explain(read_only, tmp_path))
    database = sqlite3.OperationalError("attempt to write a readonly database")
    assert str(explain(database, tmp_path)).startswith(f"{tmp_path}: cannot be written")


def test_the_unforeseen_is_one_line_and_its_traceback_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise ZeroDivisionError("division\nby zero")

    assert run_command(command, project=tmp_path) == UNFORESEEN
    said = capsys.readouterr().err
    assert said.startswith("twinloop: unexpected ZeroDivisionError: division; please report it with ")
    assert said.count("\n") == 1
    kept = Path(said.rpartition(" ")[2].strip())
    assert kept.is_relative_to(tmp_path)
    assert "in command" in kept.read_text()


def test_ctrl_c_is_130(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise KeyboardInterrupt

    assert run_command(command, project=tmp_path) == INTERRUPTED
    assert capsys.readouterr().err == "twinloop: stopped\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = "run_command(lambda: print('x\\n' * 10**6, flush=True))"
    code = f"from flows.edge import run_command; import sys; sys.exit({command})"
    piped = f'"{sys.executable}" -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", piped], cwd=PROJECT, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")


def test_only_a_full_disk_is_one() -> None:
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(ValueError("no such space"))


def test_of_sqlalchemys_words_those_of_sqlite_are_said() -> None:
    from sqlalchemy.exc import OperationalError

    wrapped = OperationalError("SELECT 1", {}, sqlite3.OperationalError("database is locked"))
    assert one_line(wrapped) == "database is locked"
    assert one_line(caused(RuntimeError("(raised as a result of …)\nSELECT"), wrapped)) == "database is locked"
