"""A signal that comes while MLflow writes is handled once that has ended: nothing half-written, nothing left locked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from twinloop.registry.tracking import Execution, Mlruns, Tracker
from twinloop.registry.whole_calls import WholeCalls, signals_wait

EXECUTION = Execution(recipe="returns", stage="sft", key="k1", settings={})
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(BaseException):
    """As Prefect raises it for SIGTERM: no Exception."""


@pytest.fixture(autouse=True)
def _signals_raise() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def signal_at_commit(number: int) -> Iterator[None]:
    def send(session: Session) -> None:
        os.kill(os.getpid(), number)

    event.listen(Session, "before_commit", send)
    try:
        yield
    finally:
        event.remove(Session, "before_commit", send)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_mlflow_is_writing_is_written_before_the_run_stops(mlruns: Mlruns, number: int) -> None:
    handlers = [signal.getsignal(each) for each in SIGNALS]
    tracker = Tracker(mlruns, EXECUTION)
    with pytest.raises(StoppedError), tracker, signal_at_commit(number):
        tracker.tag({"written": "whole"})
    run = mlruns.client.get_run(tracker.run_id)
    assert run.data.tags["written"] == "whole"
    assert run.info.status == "KILLED"
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_a_second_signal_of_a_kind_does_not_wait() -> None:
    seen = []

    def twice() -> None:
        with signals_wait():
            for time in ("one", "two"):
                os.kill(os.getpid(), signal.SIGTERM)
                seen.append(time)

    with pytest.raises(StoppedError):
        twice()
    assert seen == ["one"]


def test_a_signal_that_came_comes_also_where_the_call_fails() -> None:
    def fail() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError

    with pytest.raises(StoppedError) as stopped, signals_wait():
        fail()
    assert isinstance(stopped.value.__context__, ZeroDivisionError)


def test_a_thread_leaves_the_handlers_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with signals_wait():
            seen.extend(signal.getsignal(each) for each in SIGNALS)

    before = [signal.getsignal(each) for each in SIGNALS]
    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


def test_only_calls_wait() -> None:
    class Client:
        limit = 3

        def handler(self) -> Callable[..., object] | int | None:
            return signal.getsignal(signal.SIGTERM)

    whole = WholeCalls(Client())
    assert whole.limit == 3
    assert whole.handler() != signal.getsignal(signal.SIGTERM)


def test_a_handler_that_was_not_set_back_hands_its_signal_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the first handler, set back, is called and raises before the second is."""

    def end_with_the_first() -> None:
        with signals_wait():
            set_back = signal.signal

            def interrupted(number: int, handler: object) -> object:
                monkeypatch.undo()
                set_back(number, handler)  # type: ignore[arg-type]
                raise StoppedError

            monkeypatch.setattr(signal, "signal", interrupted)

    with pytest.raises(StoppedError):
        end_with_the_first()
    with pytest.raises(StoppedError):
        os.kill(os.getpid(), signal.SIGTERM)
