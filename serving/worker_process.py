"""This process as one of several that serve at one address: what its supervisor gave it, and what it tells it.

`serving.supervisor` starts it. They speak over a pipe, which ends with either of them.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import BinaryIO

from prometheus_client.core import Metric

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 5.0
"""Longer than a supervisor waits for the other processes."""


class SupervisorSilentError(Exception):
    """The supervisor has not answered: what all processes do is not known."""


@dataclass(frozen=True)
class Ready:
    """It listens. note: of what it serves, for the line that shows the address."""

    note: str


@dataclass(frozen=True)
class Asked:
    """The metrics of all are wanted here, under a number by which the answer is known; and that answer."""

    number: int
    metrics: list[Metric] | None = None


@dataclass(frozen=True)
class Report:
    """The supervisor wants this process's own metrics; and those."""

    metrics: list[Metric] | None = None


class WorkerProcess:
    """This end of the pipe. Safe for many threads; when the supervisor has gone, this process ends as at a SIGTERM."""

    def __init__(self, place: str):
        """place: the word that the supervisor put after this process's command. Takes what it names, once."""
        pipe, listener, limits, self.count, self.starting = map(int, place.split(","))
        self.listener = socket.socket(fileno=listener)
        self.limits: BinaryIO = os.fdopen(limits, "r+b", buffering=0)
        self._pipe = Connection(pipe)
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[list[Metric]]] = {}
        self._collect: Callable[[], Iterable[Metric]] = list
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    count: int
    """Processes that serve at the address."""
    starting: int
    """Those that load their model beside this one at its start, this one included, and need memory as it does."""

    def report(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """What this process counts, for the sum of all."""
        self._collect = collect

    def ready(self, note: str) -> None:
        """Say that requests are answered."""
        self._send(Ready(note))

    def metrics_of_all(self) -> list[Metric]:
        """The sum over all processes, those that have ended included. Raises SupervisorSilentError."""
        number, answer = next(self._numbers), queue.SimpleQueue[list[Metric]]()
        self._waiting[number] = answer
        try:
            self._send(Asked(number))
            return answer.get(timeout=ANSWER_WITHIN_S)
        except (queue.Empty, OSError):
            raise SupervisorSilentError from None
        finally:
            del self._waiting[number]

    def _send(self, message: object) -> None:
        with self._sending:
            self._pipe.send(message)

    def _listen(self) -> None:
        try:
            while True:
                message = self._pipe.recv()
                if isinstance(message, Report):
                    self._send(Report(self._own()))
                elif (answer := self._waiting.get(message.number)) is not None:
                    answer.put(message.metrics)
        except (EOFError, OSError):
            log.warning("the supervisor of this server process has ended; so does the process")
            os.kill(os.getpid(), signal.SIGTERM)

    def _own(self) -> list[Metric] | None:
        try:
            return list(self._collect())
        except Exception:
            log.exception("the metrics of this process cannot be collected")
            return None
