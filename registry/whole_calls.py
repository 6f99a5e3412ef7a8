"""Calls of MLflow's client that no signal cuts in two.

A Ctrl-C or SIGTERM raises wherever the main thread is: in the middle of a transaction, what was being written is lost.
Once, after such a SIGTERM, the database stayed locked to the run that wanted to record its end, and to the next one.
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
    came: set[int] = set()
    before: dict[int, Any] = {}
    ended = False

    def wait(number: int, frame: FrameType | None) -> None:
        if ended or number in came:  # ended: one that came while the handlers were being set back
            came.discard(number)
            signal.signal(number, before[number])
            signal.raise_signal(number)
        else:
            came.add(number)

    for number in WAITING_SIGNALS:
        handler = signal.getsignal(number)
        if handler not in (None, signal.SIG_IGN):  # None: set by other than Python, which could not set it again
            before[number] = handler
            signal.signal(number, wait)
    try:
        yield
    finally:
        ended = True
        for waiting, handler in before.items():
            signal.signal(waiting, handler)
        for waiting in came:
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
