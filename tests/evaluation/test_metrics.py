"""Rates with confidence intervals, losses in their units."""

import math

import pytest

from twinloop.evaluation.metrics import (
    Rate,
    bits_per_byte,
    percentile,
    perplexity,
    sign_test,
    wilson_interval,
)


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_wilson_interval_at_its_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(500, 500)[1] == 1.0
    assert wilson_interval(0, 500)[0] == 0.0
    assert 0.99 < wilson_interval(500, 500)[0] < 1
    with pytest.raises(ValueError, match="6 successes of 5"):
        wilson_interval(6, 5)


def test_interval_narrows_with_more_trials_and_holds_the_rate() -> None:
    widths = []
    for n in (10, 100, 1000):
        rate = Rate(successes=9 * n // 10, total=n)
        low, high = rate.interval
        assert low < rate.rate < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_nothing_tried_is_neither_success_nor_failure() -> None:
    assert math.isnan(Rate(successes=0, total=0).rate)
    assert str(Rate(successes=0, total=0)) == "none [0.0%, 100.0%] (0/0)"
    with pytest.raises(ValueError, match="3 successes of 2"):
        Rate(successes=3, total=2)


def test_losses() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    assert perplexity(10 * math.log(50), 10) == pytest.approx(50)
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(1.0, 0)


def test_percentile_is_a_measured_value() -> None:
    assert percentile([5, 1, 4, 2, 3], 0.5) == 3
    assert percentile(list(range(1, 101)), 0.95) == 95
    assert percentile(list(range(1, 21)), 0.95) == 19
    assert percentile([7.0], 0.95) == 7.0
    with pytest.raises(ValueError, match="0 values"):
        percentile([], 0.95)


def test_sign_test_is_exact() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(0, 5) == 1.0
    assert sign_test(9, 2) == pytest.approx(67 / 2048)
