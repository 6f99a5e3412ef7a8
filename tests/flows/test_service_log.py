"""A service's log is bounded, and what the service writes meanwhile is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_project import PROJECT, environment

from twinloop.flows import service_log
from twinloop.flows.service_log import FILE_BYTES, FILES_BEFORE, rotate

LINE = b"x" * 1023 + b"\n"


def test_a_long_log_is_begun_anew_and_the_oldest_goes(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    for number in range(FILES_BEFORE + 2):
        with log.open("ab") as file:
            file.write(b"%d" % number + LINE * (FILE_BYTES // len(LINE) + 1))
        rotate(log)
    assert log.stat().st_size == 0
    kept = sorted(tmp_path.glob("service.log.*"))
    assert [path.name for path in kept] == [f"service.log.{number}" for number in range(1, FILES_BEFORE + 1)]
    assert [path.read_bytes()[:1] for path in kept] == [b"%d" % (FILES_BEFORE + 1 - n) for n in range(FILES_BEFORE)]


def test_a_short_log_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    log.write_bytes(LINE)
    rotate(log)
    assert log.read_bytes() == LINE
    assert [path.name for path in tmp_path.iterdir()] == ["service.log"]


def test_a_writer_goes_on_in_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_log, "FILE_BYTES", 100_000)
    monkeypatch.setattr(service_log, "FILES_BEFORE", 1000)
    log = tmp_path / "service.log"
    code = "import os, time\nfor n in range(3000): os.write(1, b'%08d\\n' % n * 50); time.sleep(0.0002)"
    with log.open("ab") as output:
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=output)
    while writer.poll() is None:
        rotate(log)
        time.sleep(0.01)
    parts = sorted(tmp_path.glob("service.log.*"), key=lambda path: -int(path.suffix[1:]))
    lines = b"".join(path.read_bytes() for path in [*parts, log]).split(b"\n")
    assert len(parts) > 3
    # What fell into the instant of a cut is lost, and nothing else: whole blocks, in their order.
    assert lines == [*sorted(lines[:-1]), b""]
    assert len({*lines}) >= 3000 - len(parts)


def test_the_process_that_rotates_takes_each_log_of_the_folder(tmp_path: Path) -> None:
    for name in ("a.log", "b.log"):
        (tmp_path / name).write_bytes(LINE * (FILE_BYTES // len(LINE) + 1))
    process = subprocess.Popen(
        [sys.executable, "-m", "twinloop.flows.service_log", str(tmp_path)], cwd=PROJECT, env=environment()
    )
    try:
        deadline = time.monotonic() + 60
        while any(os.path.getsize(tmp_path / name) for name in ("a.log", "b.log")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
