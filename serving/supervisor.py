"""Several processes that serve at one address. Each accepts connections from the same listening socket and has a model,
a queue and threads of its own; this process starts them, replaces those that die, adds up their metrics, and stops
them. It answers no request itself, so that no request can end it.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import FrameType

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from twinloop.common.errors import UserError
from twinloop.serving.metric_sums import kept, sum_of
from twinloop.serving.worker_process import Asked, Ready, Report

log = logging.getLogger(__name__)

REPORT_WITHIN_S = 2.0
"""A process that does not report within this counts with what it reported last."""
AGAIN_AFTER_S = 1.0
AGAIN_AFTER_AT_MOST_S = 30.0
"""Before a process takes the place of one that died before it was ready: doubled each time."""


class _Worker:
    """One process, and this end of its pipe."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], pipe: Connection):
        self.number, self.process, self.pipe = number, process, pipe
        self._sending = threading.Lock()
        self.ready = False
        self.metrics: list[Metric] = []
        self.asked_at: float | None = None  # for a report that has not come

    def ask(self) -> None:
        """For its metrics, unless it is asked already."""
        if self.asked_at is None:
            self.asked_at = time.monotonic()
            self.tell(Report())

    def tell(self, message: Asked | Report) -> None:
        """In a thread: a process that is stopped reads nothing, and nobody else must wait for it."""
        threading.Thread(target=self._send, args=(message,), daemon=True).start()

    def _send(self, message: Asked | Report) -> None:
        with self._sending, suppress(OSError):  # it dies just now
            self.pipe.send(message)

    @property
    def silent(self) -> bool:
        """Whether its report may still come."""
        return self.asked_at is not None and time.monotonic() - self.asked_at < REPORT_WITHIN_S

    def __str__(self) -> str:
        return f"server process {self.number} (pid {self.process.pid})"


class Supervisor:
    """`count` processes of `command` at one listening socket.

    command: given a word, the command of a process that makes a `WorkerProcess` of it. The first process is started
    alone, so that what keeps all of them from serving is reported once, and is told how many will need memory.
    """

    def __init__(
        self, command: Callable[[str], Sequence[str]], listener: socket.socket, count: int, *, stop_within_s: float
    ):
        """stop_within_s: after a signal; a process that has not ended then is killed."""
        self._command, self._listener, self._count = command, listener, count
        self._stop_within_s = stop_within_s
        self._workers: list[_Worker] = []
        self._free = list(range(1, count + 1))  # numbers of places without a process
        self._ended: list[Metric] = []  # what processes that have ended had counted
        self._replaced = 0
        self._failed = False  # a process has ended before all had answered once
        self._again_after_s = 0.0
        self._start_at = 0.0
        self._stop_by: float | None = None
        # A signal does not end the wait for messages (PEP 475): its handler sends one.
        self._wake_reader, self._wake_writer = multiprocessing.Pipe(duplex=False)
        self._answered = False
        self._asked: list[tuple[_Worker, int]] = []  # who waits for the metrics of all
        self._note = ""
        self._exit_code = 0  # of the process that ended last

    def run(self, on_ready: Callable[[str], None]) -> int:
        """Serve until SIGTERM or Ctrl-C, and return the exit code. on_ready: is called once, with the note of the first
        process, when all answer. The processes of a server that cannot start say why on stderr themselves."""
        # The pipe is closed last, when no handler of signals writes to it any more.
        with (
            self._wake_reader,
            self._wake_writer,
            tempfile.TemporaryFile(buffering=0) as limits,
            self._handling_signals(),
        ):
            try:
                while self._workers or self._stop_by is None:
                    self._start(limits.fileno())
                    self._wait()
                    if self._stop_by is not None:
                        # Once the last process takes no more connections, none waits in a queue that nobody reads.
                        self._listener.close()
                    self._answer()
                    if not self._answered and len(self._ready) == self._count:
                        self._answered = True
                        on_ready(self._note)
                    if self._failed:
                        return self._exit_code or 1
                return 0
            finally:
                self._kill_all()

    @property
    def _ready(self) -> list[_Worker]:
        return [each for each in self._workers if each.ready]

    @property
    def _alone(self) -> bool:
        """Whether no process has answered yet: the next one is the first."""
        return not self._answered and not self._ready

    @property
    def _startable(self) -> list[int]:
        """Numbers for which a process may be started, once it is time."""
        if self._stop_by is not None or (self._alone and self._workers):
            return []
        return self._free[:1] if self._alone else list(self._free)

    def _start(self, limits: int) -> None:
        if time.monotonic() < self._start_at:
            return
        starting = self._count if self._alone else 1
        for number in self._startable:
            self._free.remove(number)
            self._start_one(number, limits, starting=starting)

    def _start_one(self, number: int, limits: int, *, starting: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        handed = [theirs.fileno(), self._listener.fileno(), limits]
        place = ",".join(map(str, [*handed, self._count, starting]))
        # A session of its own: Ctrl-C is for the supervisor, which passes it on once.
        process = subprocess.Popen(
            self._command(place), pass_fds=handed, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._workers.append(_Worker(number, process, ours))
        if self._stop_by is not None:  # a signal has come in between
            process.terminate()

    def _wait(self) -> None:
        """For what the processes say, or until something is to be done."""
        ends = [each.asked_at + REPORT_WITHIN_S for each in self._workers if each.silent and each.asked_at is not None]
        if self._stop_by is not None:
            ends.append(self._stop_by)
        if self._startable:
            ends.append(self._start_at)
        pipes = [self._wake_reader, *(each.pipe for each in self._workers)]
        for pipe in wait(pipes, max(0.0, min(ends) - time.monotonic()) if ends else None):
            if pipe is self._wake_reader:
                self._wake_reader.recv()
                continue
            worker = next(each for each in self._workers if each.pipe is pipe)
            try:
                self._take(worker, worker.pipe.recv())
            except (EOFError, OSError):
                self._end(worker)
        if self._stop_by is not None and time.monotonic() >= self._stop_by:
            for each in self._workers:
                log.warning("%s has not ended within %g s: it is killed", each, self._stop_within_s)
            self._kill_all()

    def _take(self, worker: _Worker, message: object) -> None:
        if isinstance(message, Ready):
            worker.ready, self._again_after_s = True, 0.0
            self._note = self._note or message.note
            if self._answered:
                log.warning("%s answers now", worker)
        elif isinstance(message, Report):
            worker.asked_at = None
            worker.metrics = worker.metrics if message.metrics is None else message.metrics
        elif isinstance(message, Asked):
            self._asked.append((worker, message.number))
            for each in self._ready:
                each.ask()

    def _answer(self) -> None:
        """Send the metrics of all to those who wait for them, once everybody has reported who will."""
        if not self._asked or any(each.silent for each in self._ready):
            return
        metrics = self._metrics()
        for worker, number in self._asked:
            worker.tell(Asked(number, metrics))
        self._asked = []

    def _metrics(self) -> list[Metric]:
        replaced = CounterMetricFamily(
            "twinloop_workers_replaced", "Server processes that died and were replaced", self._replaced
        )
        workers = GaugeMetricFamily("twinloop_workers", "Server processes that answer", len(self._ready))
        return [*sum_of([self._ended, *(each.metrics for each in self._workers)]), workers, replaced]

    def _end(self, worker: _Worker) -> None:
        """Of a process that has closed its pipe, which it does when it ends."""
        self._workers.remove(worker)
        worker.pipe.close()
        try:
            self._exit_code = worker.process.wait(self._stop_within_s)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            self._exit_code = worker.process.wait()
        self._ended = sum_of([self._ended, kept(worker.metrics)])
        self._asked = [each for each in self._asked if each[0] is not worker]
        self._free.append(worker.number)
        if self._stop_by is not None:
            return
        reason = _reason(self._exit_code)
        if not self._answered:
            if self._exit_code < 0:  # else it has said why itself
                raise UserError(f"serve: {worker} has ended before it answered ({reason})")
            self._failed = True
            return
        log.warning("%s has ended (%s); another one takes its place", worker, reason)
        if worker.ready:
            self._replaced += 1
        else:
            self._again_after_s = min(max(AGAIN_AFTER_S, 2 * self._again_after_s), AGAIN_AFTER_AT_MOST_S)
        self._start_at = time.monotonic() + self._again_after_s

    def _stop(self, *_: FrameType | int | None) -> None:
        """At a signal: the processes answer what they have begun. At a second one they end at once."""
        self._stop_by = self._stop_by or time.monotonic() + self._stop_within_s
        for each in self._workers:
            each.process.terminate()
        self._wake_writer.send(None)

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _kill_all(self) -> None:
        for each in self._workers:
            each.process.kill()
            each.process.wait()


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
