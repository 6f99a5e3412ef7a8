"""The law of small runs beside a larger one, on losses that follow a law, and on one that does not."""

from __future__ import annotations

import pytest

from benchmarks.scaling import compared
from twinloop.tasks.scaling import Measured


def measured(depth: int, tokens: int, *, lost: float = 0.0) -> Measured:
    parameters = 20_000 * depth**3
    loss = 0.3 + 2 / parameters**0.35 + 6 / tokens**0.35 + lost
    return Measured(depth, parameters, tokens, loss, flops=6.0 * parameters, seconds=1e-4, busy_cores=0.0)


@pytest.mark.parametrize(("lost", "held"), [(0.0, "within 3: yes"), (-0.05, "within 3: **no**")])
def test_a_run_of_a_law_is_foreseen_and_one_that_leaves_it_is_not(lost: float, held: str) -> None:
    runs = [measured(depth, tokens) for depth in (1, 2, 3) for tokens in (300_000, 1_000_000)]
    *small, predicted, reached, off = compared(runs, measured(4, 2_100_000, lost=lost))
    assert len(small) == len(runs)
    assert "5.0 times the compute" in reached.setting
    assert reached.value == f"{measured(4, 2_100_000, lost=lost).loss:.4f}"
    assert float(predicted.value) == pytest.approx(measured(4, 2_100_000).loss, rel=0.03)
    assert off.must_be == held
