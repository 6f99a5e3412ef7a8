"""Calls of MLflow's client that no signal cuts in two.

A Ctrl-C or SIGTERM that raises in the middle of a transaction can leave SQLAlchemy's session (2.0) in a state that it
can't close. SQLite then stays locked for as long as the exception is on its way out: to the run that wants to record
that it was stopped, and to every other process.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WAITING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_wait() -> Iterator[None]:
    """In the main thread, SIGINT and SIGTERM are handled when the body has ended; a second one of a kind at once.
    Other threads are not interrupted by signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {}

    def wait(number: int, frame: FrameType | None) -> None:
        if number in came:
            signal.signal(number, before.pop(number))
            signal.raise_signal(number)
        else:
            came.append(number)

    for number in WAITING_SIGNALS:
        handler = signal.getsignal(number)
        if handler not in (None, signal.SIG_IGN):  # None: set by other than Python, which could not set it again
            before[number] = handler
            signal.signal(number, wait)
    try:
        yield
    finally:
        for waiting, handler in before.items():
            signal.signal(waiting, handler)
        for waiting in came:
            if waiting in before:
                signal.raise_signal(waiting)


class WholeCalls:
    """An object whose methods run under `signals_wait`; all else is the object's own."""

    def __init__(self, of: object):
        self._of = of

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of, name)
        return _whole(value) if callable(value) else value


def _whole(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        with signals_wait():
            return method(*arguments, **named)

    return call
