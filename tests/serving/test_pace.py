"""Prompts are read in pieces in which few steps of the streams beside them would pass, by a clock that stands still."""

from __future__ import annotations

import pytest

from twinloop.serving.engine import pace as pace_module
from twinloop.serving.engine.pace import LEAST_TOKENS, Pace
from twinloop.serving.engine.slots import PromptRead


@pytest.fixture
def work(monkeypatch):
    """Makes work that takes so many seconds."""
    now = [0.0]
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: now[0])

    def taking(seconds, result=None):
        def done():
            now[0] += seconds
            return result

        return done

    return taking


@pytest.mark.parametrize(
    ("step_s", "token_s", "tokens"),
    [
        (0.015, 0.0009, 50),  # three steps
        (0.060, 0.0030, 60),
        (0.015, 0.0030, LEAST_TOKENS),  # fewer would cost too much each
        (0.0003, 0.00003, 128),  # nobody sees such a pause
        (0.100, 0.0010, 128),
    ],
)
def test_a_stream_waits_for_few_of_its_own_steps(work, step_s, token_s, tokens):
    pace = Pace(128)
    for _ in range(5):
        pace.step(work(step_s))
        pace.read(work(token_s * 40, PromptRead(computed=40, drawn=None, cost=40)))
    assert pace.tokens(streams=True) == pytest.approx(tokens, abs=1)
    assert pace.tokens(streams=False) == 128


def test_it_follows_what_things_cost_now_and_a_copied_prompt_says_nothing(work):
    pace = Pace(128)
    assert pace.tokens(streams=True) == 128  # nothing is known yet
    for step_s in (0.001, 0.030):
        for _ in range(60):
            pace.step(work(step_s))
            pace.read(work(0.050, PromptRead(computed=50, drawn=None, cost=50)))
            pace.read(work(9.0, PromptRead(computed=0, drawn=None, cost=16)))
    assert pace.tokens(streams=True) == pytest.approx(90, abs=1)
