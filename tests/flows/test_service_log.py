"""A service's log is bounded, and holds its last words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from small_project import PROJECT, environment

from flows.service_log import FILE_BYTES, FILES_BEFORE

LINE = b"x" * 1023 + b"\n"


def write(log: Path, *parts: bytes, signals: tuple[signal.Signals, ...] = ()) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "flows.service_log", str(log)], cwd=PROJECT, env=environment(), stdin=subprocess.PIPE
    )
    assert writer.stdin is not None
    for part in parts:
        writer.stdin.write(part)
        writer.stdin.flush()
        if part is parts[0] and signals:
            while not log.exists():
                assert writer.poll() is None
            for number in signals:
                writer.send_signal(number)
    writer.stdin.close()
    assert writer.wait(60) == 0


def test_it_is_begun_anew_when_it_is_long_and_the_old_ones_go(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    files = FILES_BEFORE + 1
    write(log, LINE * (FILE_BYTES * (files + 1) // len(LINE)), b"last words\n")
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == ["service.log", *(f"service.log.{n}" for n in range(1, files))]
    assert all(path.stat().st_size <= FILE_BYTES for path in found)
    assert log.read_text().endswith("last words\n")


def test_what_a_service_says_while_it_is_asked_to_end_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    write(log, b"first\n", b"last", signals=(signal.SIGTERM, signal.SIGINT))
    assert log.read_text() == "first\nlast\n"


def test_bytes_that_are_no_text_and_endless_lines_are_taken(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    write(log, os.urandom(64).replace(b"\n", b" ") + b"\n", b"y" * 200_000)
    assert log.read_text().count("y") >= 200_000
