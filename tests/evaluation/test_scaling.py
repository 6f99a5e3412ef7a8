"""The scaling law: fitted to what is known, and the choices that follow from it."""

from __future__ import annotations

import numpy as np
import pytest

from twinloop.common.errors import UserError
from twinloop.evaluation.scaling import (
    Choice,
    Fit,
    Run,
    ScalingLaw,
    Size,
    best_choice,
    chinchilla_choice,
    fit_cost,
    fit_law,
    nearest_size,
    predict_largest,
)

# Chinchilla's law as Besiroglu et al. (2024) fitted it again, in nats a token.
LAW = ScalingLaw(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)
SIZES = [10**6, 4 * 10**6, 16 * 10**6, 64 * 10**6, 256 * 10**6]
TOKENS = [10**7, 4 * 10**7, 16 * 10**7, 64 * 10**7, 256 * 10**7]


def runs_of(law: ScalingLaw, sizes: list[int], tokens: list[int], noise: float, seed: int = 0) -> list[Run]:
    random = np.random.default_rng(seed)
    grid = [(size, count) for size in sizes for count in tokens]
    return [Run(*each, law.loss(*each) * float(np.exp(noise * random.standard_normal()))) for each in grid]


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fit_law(runs_of(LAW, SIZES, TOKENS, 0.005), samples=60)


def test_known_constants_are_within_the_intervals_of_a_fit_to_noisy_runs(fit: Fit) -> None:
    for value in (lambda law: law.E, lambda law: law.alpha, lambda law: law.beta):
        low, high = fit.interval(value)
        assert low < value(LAW) < high
        assert high - low < 0.5 * value(LAW)
    assert fit.noise == pytest.approx(0.005, rel=0.5)


def test_a_loss_far_beyond_the_runs_is_within_its_interval(fit: Fit) -> None:
    size, tokens = 70 * 10**9, 1.4 * 10**12
    low, high = fit.interval(lambda law: law.loss(size, tokens))
    assert low < LAW.loss(size, tokens) < high
    near_low, near_high = fit.interval(lambda law: law.loss(SIZES[-1], TOKENS[-1]))
    assert near_high - near_low < high - low


def test_without_noise_the_fit_goes_through_the_runs() -> None:
    runs = runs_of(LAW, SIZES[:3], TOKENS[:2], 0.0)
    law = fit_law(runs, samples=0).law
    for run in runs:
        assert law.loss(run.parameters, run.tokens) == pytest.approx(run.loss, rel=0.005)


def test_six_runs_predict_one_of_five_times_their_compute_within_the_interval() -> None:
    """A small law in bits a byte, as of a network of 0.1M weights."""
    law = ScalingLaw(E=0.3, A=1.5, alpha=0.3, B=9.0, beta=0.35)
    for seed in range(5):
        fit = fit_law(runs_of(law, [34_000, 147_000, 420_000], [330_000, 1_000_000], 0.005, seed), samples=60)
        expected = law.loss(934_000, 2_250_000)
        low, high = fit.interval(lambda each: each.loss(934_000, 2_250_000))
        assert low < expected < high
        assert fit.law.loss(934_000, 2_250_000) == pytest.approx(expected, rel=0.03)


def test_one_run_that_went_wrong_moves_the_law_little() -> None:
    runs = runs_of(LAW, SIZES, TOKENS, 0.002)
    spoilt = [Run(runs[7].parameters, runs[7].tokens, runs[7].loss * 1.5) if run is runs[7] else run for run in runs]
    far = 10**9, 10**10
    assert fit_law(spoilt, samples=0).law.loss(*far) == pytest.approx(LAW.loss(*far), rel=0.02)


@pytest.mark.parametrize(
    ("sizes", "tokens", "said"),
    [
        ([1, 2, 3], [10], "3 runs are too few for a fit; it takes at least 4"),
        ([1, 2, 3, 4], [10], "all runs have one number of tokens"),
        ([1], [10, 20, 30, 40], "all runs have one size"),
    ],
)
def test_runs_that_say_too_little_are_refused_in_one_line(sizes: list[int], tokens: list[int], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        fit_law(runs_of(LAW, sizes, tokens, 0.0))
    assert "\n" not in str(raised.value)


def test_the_largest_run_is_predicted_from_the_others() -> None:
    runs = runs_of(LAW, SIZES[:3], TOKENS[:2], 0.0)
    checked = predict_largest(runs)
    assert checked
    largest, predicted = checked
    assert (largest.parameters, largest.tokens) == (SIZES[2], TOKENS[1])
    assert predicted == pytest.approx(largest.loss, rel=0.01)
    assert predict_largest(runs[:4]) is None


def test_the_best_choice_is_where_the_derivative_of_the_loss_vanishes() -> None:
    """At 6 N D FLOPs: Hoffmann et al. (2022), equation 4."""
    flops = 5.76e23
    grid = [Size(depth, round(10**8 * 1.01**depth), 6.0 * round(10**8 * 1.01**depth)) for depth in range(1000)]
    a, b = LAW.beta / (LAW.alpha + LAW.beta), LAW.alpha / (LAW.alpha + LAW.beta)
    scale = (LAW.alpha * LAW.A / (LAW.beta * LAW.B)) ** (1 / (LAW.alpha + LAW.beta))
    best = best_choice(LAW, grid, flops)
    assert best.size.parameters == pytest.approx(scale * (flops / 6) ** a, rel=0.02)
    assert best.tokens == pytest.approx((flops / 6) ** b / scale, rel=0.02)
    assert LAW.best_parameters(best.tokens) == pytest.approx(best.size.parameters, rel=0.03)
    assert nearest_size(grid, best.size.parameters * 1.004) == best.size


@pytest.mark.parametrize(("A", "nearest"), [(1e-9, 0), (1e9, 1)])
def test_a_law_with_an_exponent_near_zero_has_a_best_size_too(A: float, nearest: int) -> None:
    law = ScalingLaw(E=1.0, A=A, alpha=0.001, B=1.0, beta=0.3)
    sizes = [Size(1, 10**4, 1.0), Size(2, 10**8, 1.0)]
    assert nearest_size(sizes, law.best_parameters(1e12)) == sizes[nearest]


def test_chinchillas_rule_spends_the_budget_with_twenty_tokens_a_weight() -> None:
    grid = [Size(depth, 10**6 * 2**depth, 6e6 * 2**depth) for depth in range(10)]
    choice = chinchilla_choice(grid, 6 * 20 * (8 * 10**6) ** 2)
    assert choice == Choice(grid[3], 20 * 8e6)


def test_seconds_a_token_have_a_part_that_no_size_changes() -> None:
    flops = [1e5, 4e5, 9e5, 9e5]
    cost = fit_cost(flops, [2e-5 + 1e-11 * each for each in flops])
    assert cost(5e6) == pytest.approx(7e-5, rel=1e-3)
    assert fit_cost([1e5, 1e6], [1e-5, 1e-4])(1e7) == pytest.approx(1e-3, rel=1e-3)
