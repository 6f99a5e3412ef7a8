"""Processes that outlive the command that starts them: started with a log, found again, and ended with all they began.

Each is the first of a session of its own, with its log and its process id under state/services/. Everything that it
starts inherits MARK, by which what a killed one left behind is found too: a flow run has a session of its own.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from twinloop.common.errors import UserError
from twinloop.common.files import has_space

READY_WITHIN_S = 180.0
STOP_WITHIN_S = 20.0
MARK = "TWINLOOP_SERVICE"


def launch(project: Path, name: str, command: list[str], *, ready: Callable[[], bool]) -> None:
    """Start it, and return once it is ready. Raises UserError, with its last output, where it does not get ready."""
    pid_file = _pid_file(project, name)
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    log = pid_file.with_suffix(".log")
    with log.open("ab") as output:
        before = output.tell()
        child = subprocess.Popen(
            command,
            cwd=project,
            env=os.environ | {MARK: _mark(project, name)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    pid_file.write_text(str(child.pid))
    deadline = time.monotonic() + READY_WITHIN_S
    while not ready():
        if child.poll() is not None or time.monotonic() > deadline:
            if not has_space(log):  # which could not take the reason
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log))
            raise UserError(f"{name}: did not start ({_last_error(log, before)}); see {log}")
        time.sleep(0.2)


def alive(project: Path, name: str) -> psutil.Process | None:
    """The process, if it runs. A process id alone may be another program's by now: ours has MARK."""
    try:
        process = psutil.Process(int(_pid_file(project, name).read_text()))
    except (OSError, ValueError, psutil.Error):
        return None
    return process if _has_mark(process, _mark(project, name)) else None


def marked(project: Path, name: str) -> list[psutil.Process]:
    """Every process of that name, its children's children and orphans too."""
    mark = _mark(project, name)
    return [found for found in psutil.process_iter() if found.pid != os.getpid() and _has_mark(found, mark)]


def stop(project: Path, name: str) -> bool:
    """End it, and then what is left of what it began. Whether there was anything."""
    process = alive(project, name)
    if process is not None:
        end([process])
    left = marked(project, name)
    end(left)
    _pid_file(project, name).unlink(missing_ok=True)
    return process is not None or bool(left)


def end(processes: list[psutil.Process]) -> None:
    """Ask each of them to end, and make those that do not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, processes = psutil.wait_procs(processes, timeout=STOP_WITHIN_S)


def _last_error(log: Path, since: int) -> str:
    """The last line that speaks of an error, or else the last."""
    content = log.read_bytes() if log.exists() else b""
    said = content[since:] if len(content) >= since else content  # shorter: a new file has been begun
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:200]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):  # gone, or another user's
        return False


def _mark(project: Path, name: str) -> str:
    return f"{name} of {project}"


def _pid_file(project: Path, name: str) -> Path:
    return project / "state" / "services" / f"{name}.pid"
