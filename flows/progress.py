"""Progress of the stages as Prefect's progress artifacts: what the display shows, on the pages of the task runs.

A thread of its own writes the latest state every few seconds. What trains only notes it: no request to Prefect's server
is on its path, and a server that is gone costs it nothing.
"""

from __future__ import annotations

import contextvars
import logging
import re
import threading
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self
from uuid import UUID

from rich.console import Console

from twinloop.common.errors import one_line
from twinloop.flows.display import Display, describe

log = logging.getLogger(__name__)

EVERY_S = 5.0
LAST_WITHIN_S = 10.0
"""What ended at the end of a flow may take to be written."""


def artifact_key(name: str) -> str:
    """The name as the key of a Prefect artifact: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower())


class _Stage:
    """The running stage. context: of its Prefect task, so that its artifacts belong to the task's run."""

    def __init__(self, name: str):
        self.name = name
        self.context = contextvars.copy_context()
        self.state = 0.0, name
        """Percent, and what is shown beside it."""
        self.written: tuple[float, str] | None = None
        self.artifact: UUID | None = None

    def write(self) -> None:
        """To Prefect, where something has changed since the last time."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        now = self.state
        if now == self.written:
            return
        if self.artifact is None:
            key = artifact_key(f"progress-{self.name}")
            self.artifact = self.context.run(create_progress_artifact, now[0], key, now[1])  # type: ignore[assignment]
        else:
            self.context.run(update_progress_artifact, self.artifact, *now)
        self.written = now


def _write(stage: _Stage) -> None:
    try:
        stage.write()
    except Exception as trouble:  # whatever Prefect's client raises: the work goes on without it
        log.debug("Prefect has no progress of %s: %s", stage.name, one_line(trouble))


class ReportedDisplay:
    """A display whose progress Prefect has too."""

    def __init__(self, display: Display, *, every_s: float = EVERY_S):
        self._display = display
        self._every_s = every_s
        self._running: _Stage | None = None
        self._ended: deque[_Stage] = deque()
        self._over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="progress", daemon=True)

    @property
    def console(self) -> Console:
        return self._display.console

    def __enter__(self) -> Self:
        self._display.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._wake.set()
        self._thread.join(LAST_WITHIN_S)
        self._display.__exit__(kind, error, trace)

    def started(self, stage: str) -> None:
        self._display.started(stage)
        self._running = _Stage(stage)

    def stepped(self, stage: str, done: float, total: float, metrics: Mapping[str, float]) -> None:
        self._display.stepped(stage, done, total, metrics)
        if (running := self._running) and total:
            state = f"{stage}: {done:g}/{total:g}  {describe(metrics)}".strip()
            running.state = min(100.0, 100 * done / total), state

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None:
        self._display.finished(stage, seconds=seconds, name=name)
        running, self._running = self._running, None
        if running and seconds is not None:  # of what was only verified there is no progress
            running.state = 100.0, f"{running.state[1]} (done in {seconds:.1f} s)"
            self._ended.append(running)
            self._wake.set()

    def _write_all(self) -> None:
        while not self._over:
            self._wake.wait(self._every_s)
            self._wake.clear()
            while self._ended:
                _write(self._ended.popleft())
            if running := self._running:
                _write(running)
