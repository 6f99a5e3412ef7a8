"""A Ctrl-C that a library swallows stops the run at its next step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from small_project import make_project, start

from twinloop.flows.display import LiveDisplay, PlainDisplay
from twinloop.flows.interrupt import interruptible


def swallowed_by_a_library() -> None:
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("make_display", [PlainDisplay, LiveDisplay])
def test_a_swallowed_interrupt_comes_back_at_the_next_step(
    make_display: Callable[[], PlainDisplay | LiveDisplay],
) -> None:
    with interruptible(), make_display() as display:
        display.started("pretrain")
        swallowed_by_a_library()
        with pytest.raises(KeyboardInterrupt):
            display.stepped("pretrain", 1, 10, {})
        with pytest.raises(KeyboardInterrupt):
            display.started("sft")


def test_it_is_forgotten_with_the_run_that_it_stopped() -> None:
    before = signal.getsignal(signal.SIGINT)
    with suppress(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    with PlainDisplay() as display:
        display.started("pretrain")


def test_an_error_that_a_library_raises_for_it_is_the_interrupt() -> None:
    def answered_with_another_error() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("Task run is not set") from None

    with pytest.raises(KeyboardInterrupt), interruptible():
        answered_with_another_error()
    with pytest.raises(ValueError, match="its own"), interruptible():
        raise ValueError("its own")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    process = start(project, "run", "recipes/small.yaml")
    assert process.stdout is not None
    process.stdout.readline()  # the first stage is done
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "run it again" in stderr
