"""Servers as processes of their own: held to some cores, watched, and always ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.processes import last_words
from benchmarks.serving.clock import Clock, cpu_seconds
from benchmarks.serving.engines import on_cores
from twinloop.common.errors import UserError

START_WITHIN_S, STOP_WITHIN_S = 120.0, 20.0


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    pid: int
    clock: Clock

    def seconds(self) -> float:
        """Its time so far; differences count."""
        return cpu_seconds(self.pid) if self.clock.by_cpu else time.perf_counter()

    def get(self, route: str) -> Any:
        """The JSON that it answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{route}", timeout=10) as response:
            return json.load(response)

    @property
    def memory_mib(self) -> float:
        """What of it is in memory now (RSS), mapped files included."""
        return float(psutil.Process(self.pid).memory_info().rss / 2**20)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def running(name: str, command: Sequence[object], cores: Sequence[int], *, port: int = 0) -> Iterator[Server]:
    """A server that answers. port: where it will listen; 0: its first line on stdout says.

    Raises UserError, with its last words, where it does not start.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        environment = os.environ | {"OMP_NUM_THREADS": str(len(cores))}
        process = subprocess.Popen(on_cores(command, cores), stdout=said, stderr=errors, env=environment)
        try:
            yield Server(name, _wait(name, process, said, errors, port), process.pid, Clock.on(len(cores)))
        finally:
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(name: str, process: subprocess.Popen[bytes], said: Any, errors: Any, port: int) -> int:
    until = time.monotonic() + START_WITHIN_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise UserError(f"{name}: {last_words(process.returncode, _text(errors), _text(said))}")
        if not port and (first := _text(said)).endswith("\n"):
            port = int(first.splitlines()[0].rsplit(":", 1)[1])
        if port and _answers(port):
            return port
        time.sleep(0.05)
    raise UserError(f"{name}: it does not answer within {START_WITHIN_S:.0f} s")


def _text(file: Any) -> str:
    """What a process has written so far, whose offset in the file is its own."""
    text: bytes = os.pread(file.fileno(), 1 << 20, 0)
    return text.decode(errors="replace")


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:  # not yet, or 503 while it loads
        return False
