"""Live progress: bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

from twinloop.flows.interrupt import raise_if_interrupted

PLAIN_EVERY_S = 10.0
WIDTH_WITHOUT_TERMINAL = 120
OUR_LOGGER = "twinloop"
UNITS = {"tokens_per_s": "tokens/s"}
"""What people call a metric, where that is not its name."""


class Display(Protocol):
    """What the flow reports to its user. Also a `twinloop.tasks.context.Progress`."""

    console: Console

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def started(self, stage: str) -> None: ...

    def stepped(self, stage: str, done: float, total: float, metrics: Mapping[str, float]) -> None: ...

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None: ...


def make_console() -> Console:
    """For stdout. Where that is no terminal, wide enough for any of our tables."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)


def make_display() -> Display:
    """Bars where stdout is a terminal, lines where it is a file, a pipe or a worker's log."""
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()


class _Notices(logging.Handler):
    """Warnings of our own packages: one line each, above the bars."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(f"! {record.getMessage()}", style="yellow", highlight=False, markup=False, soft_wrap=True)


class PlainDisplay:
    """A line when a stage starts, one every ten seconds while it works, one when it is done."""

    def __init__(self) -> None:
        self.console = make_console()
        self._notices = _Notices(self.console)
        self._printed = 0.0
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        _attach(self._notices)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _detach(self._notices)

    def started(self, stage: str) -> None:
        raise_if_interrupted()
        self._printed, self._first = time.monotonic(), None

    def stepped(self, stage: str, done: float, total: float, metrics: Mapping[str, float]) -> None:
        raise_if_interrupted()
        now = time.monotonic()
        if self._first is None:  # reading the data before it has no pace
            self._first = now, done
        since, behind = self._first
        if now - self._printed < PLAIN_EVERY_S or done == behind:
            return
        self._printed = now
        left_s = (now - since) / (done - behind) * (total - done)
        self._say(f"  {stage:<16} step {done:g}/{total:g}  {describe(metrics)}  {left_s:.0f} s left")

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None:
        self._say(_finished(stage, seconds, name))

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.console.file.flush()  # whoever reads the log reads it now


class _Latest(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(describe(task.fields["metrics"]), style="cyan")


class LiveDisplay:
    """One bar for the running stage; finished stages are printed above it."""

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:g}/{task.total:g}"),
            _Latest(),
            TimeLeft(compact=True),
            TextColumn("left"),
        )
        self.console = self._bars.console
        self._notices = _Notices(self.console)
        self._bar: TaskID | None = None

    def __enter__(self) -> Self:
        _attach(self._notices)
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_bar()
        self._bars.stop()
        _detach(self._notices)

    def started(self, stage: str) -> None:
        raise_if_interrupted()
        self._remove_bar()
        self._bar = self._bars.add_task(stage, total=1, metrics={})

    def stepped(self, stage: str, done: float, total: float, metrics: Mapping[str, float]) -> None:
        raise_if_interrupted()
        if self._bar is not None:
            self._bars.update(self._bar, completed=done, total=total, metrics=dict(metrics))

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None:
        self._remove_bar()
        self.console.print(_finished(stage, seconds, name), highlight=False, markup=False)

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None


def _attach(handler: logging.Handler) -> None:
    logger = logging.getLogger(OUR_LOGGER)
    logger.addHandler(handler)
    logger.propagate = False  # Prefect's console would print it once more


def _detach(handler: logging.Handler) -> None:
    logger = logging.getLogger(OUR_LOGGER)
    logger.removeHandler(handler)
    logger.propagate = True


def describe(metrics: Mapping[str, float]) -> str:
    """The latest values in a line."""
    named = {UNITS.get(name, name): value for name, value in metrics.items()}
    return "  ".join(f"{name} {value:,.0f}" if value >= 100 else f"{name} {value:.3f}" for name, value in named.items())


def _finished(stage: str, seconds: float | None, name: str) -> str:
    how = "already done, verified" if seconds is None else f"done in {seconds:.1f} s"
    return f"✓ {stage:<16} {how:<22} {name}"
