"""How a network's loss depends on its size and on the tokens that it was trained on: fitted on small runs.

    loss(N, D) = E + A / N^alpha + B / D^beta        (Hoffmann et al., 2022, the third of its approaches)

N: weights. D: tokens. E: what no size and no number of tokens removes. As there, the fit is one of log loss by a Huber
loss from several starts. A handful of runs does not determine five constants, so the exponents are held near those that
were found for language models (0.34 and 0.28 there; 0.35 and 0.37 by Besiroglu et al., 2024), by a prior of ours. It is
normal up to HUBER deviations and exponential beyond, since it goes through the same loss: those exponents are of web
text, and runs on a narrow corpus that say otherwise need not work against a square. The more runs there are, the less
it matters. What is uncertain is found by fitting again and again to losses with noise on
them, and to priors whose means are drawn too (a parametric bootstrap; with a prior, randomised maximum likelihood).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from twinloop.common.errors import UserError

MIN_RUNS = 4
EXPONENT, EXPONENT_SPREAD = 0.35, 0.2
"""Of the prior: its mean and, where it is normal, its standard deviation."""
NOISE, NOISE_WEIGHT = 0.01, 2.0
"""Standard deviation of a run's log loss by its seed, as it is before any run, and for how many runs that counts."""
HUBER = 1.345
"""In standard deviations: residuals beyond, the prior's too, count by their size, not by their square (95% efficient
for normal ones)."""
MAD = 1.4826
"""A normal distribution's standard deviation, by the median of its absolute deviations: no outlier moves it far."""
SAMPLES = 200
LOG_MOST = 700.0
"""Its exponential is a float still: a fit may leave an exponent near 0, by which one divides."""
CHINCHILLA = 20
"""Tokens a weight, about, where compute is spent best on web text (Hoffmann et al., 2022)."""


@dataclass(frozen=True)
class Run:
    """One training. loss: on held-out text, after its learning rate has decayed, in any unit."""

    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    def best_parameters(self, tokens: float) -> float:
        """The size for which so many tokens are the best use of compute, which is as N D: where both terms fall alike,
        alpha A / N^alpha = beta B / D^beta."""
        ratio = np.log(self.alpha * self.A) - np.log(self.beta * self.B) + self.beta * np.log(tokens)
        return float(np.exp(np.clip(ratio / self.alpha, -LOG_MOST, LOG_MOST)))


@dataclass(frozen=True)
class Fit:
    """law: the likeliest. samples: laws as likely as their noise. noise: standard deviation of a run's log loss."""

    law: ScalingLaw
    samples: tuple[ScalingLaw, ...]
    noise: float

    def interval(self, value: Callable[[ScalingLaw], float]) -> tuple[float, float]:
        """Of what a law says, 95%."""
        low, high = np.quantile([value(law) for law in self.samples], (0.025, 0.975))
        return float(low), float(high)


@dataclass(frozen=True)
class Size:
    """A network that a budget may be spent on. cost: of training it on a token, in the unit of the budget."""

    depth: int
    parameters: int
    cost: float


@dataclass(frozen=True)
class Choice:
    """A network, and the tokens that it is trained on."""

    size: Size
    tokens: float

    def loss(self, law: ScalingLaw) -> float:
        return law.loss(self.size.parameters, self.tokens)


def fit_law(runs: Sequence[Run], *, samples: int = SAMPLES, seed: int = 0) -> Fit:
    """The law of these runs. Raises UserError for fewer than four, and for runs of one size or one number of tokens."""
    if len(runs) < MIN_RUNS:
        raise UserError(f"scaling law: {len(runs)} runs are too few for a fit; it takes at least {MIN_RUNS}")
    for name, values in (
        ("size", {run.parameters for run in runs}),
        ("number of tokens", {run.tokens for run in runs}),
    ):
        if len(values) < 2:
            raise UserError(f"scaling law: all runs have one {name}, so its effect cannot be seen; take several")
    problem = _Problem(runs)
    prior = np.array([EXPONENT, EXPONENT])
    best = problem.solve(problem.starts(), problem.log_loss, prior, NOISE)
    spread = MAD * float(np.median(np.abs(problem.predicted(best) - problem.log_loss)))
    freedom = max(0, len(runs) - len(best))
    noise = float(np.sqrt((NOISE_WEIGHT * NOISE**2 + len(runs) * spread**2) / (NOISE_WEIGHT + freedom)))
    best = problem.solve([best], problem.log_loss, prior, noise)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        log_loss = problem.log_loss + noise * random.standard_normal(len(runs))
        means = prior + EXPONENT_SPREAD * random.standard_normal(2)
        drawn.append(problem.law(problem.solve([best], log_loss, means, noise)))
    return Fit(problem.law(best), tuple(drawn), noise)


def predict_largest(runs: Sequence[Run]) -> tuple[Run, float] | None:
    """The run of most compute, and its loss as a fit to those of less predicts it. None where these are too few."""
    largest = max(runs, key=_compute)
    others = [run for run in runs if run is not largest]
    try:
        return largest, fit_law(others, samples=0).law.loss(largest.parameters, largest.tokens)
    except UserError:
        return None


def best_choice(law: ScalingLaw, sizes: Sequence[Size], budget: float) -> Choice:
    """What gets the lowest loss for a budget that is spent whole."""
    return min((Choice(size, budget / size.cost) for size in sizes), key=lambda choice: choice.loss(law))


def chinchilla_choice(sizes: Sequence[Size], budget: float) -> Choice:
    """What spends the budget with about 20 tokens a weight."""
    choices = [Choice(size, budget / size.cost) for size in sizes]
    return min(choices, key=lambda choice: abs(np.log(choice.tokens / (CHINCHILLA * choice.size.parameters))))


def nearest_size(sizes: Sequence[Size], parameters: float) -> Size:
    return min(sizes, key=lambda size: abs(np.log(size.parameters / parameters)))


def fit_cost(flops: Sequence[float], seconds: Sequence[float]) -> Callable[[float], float]:
    """Seconds a token by its FLOPs, from those of some runs: a part that no size changes, and one that grows."""
    found = least_squares(
        lambda line: (line[0] + line[1] * np.asarray(flops)) / np.asarray(seconds) - 1,
        [0.0, sum(seconds) / sum(flops)],
        bounds=([0.0, 0.0], np.inf),
        x_scale=[np.mean(seconds), np.mean(seconds) / np.mean(flops)],
    )
    fixed, per_flop = found.x
    return lambda of_token: float(fixed + per_flop * of_token)


def _compute(run: Run) -> float:
    return run.parameters * run.tokens


class _Problem:
    """The fit in logarithms, sizes and tokens in units of their means, where the constants are nearly independent.

    A solution: (log E, log of each term's share at the mean, alpha, beta).
    """

    def __init__(self, runs: Sequence[Run]):
        self.log_loss = np.log([run.loss for run in runs])
        sizes, tokens = np.log([run.parameters for run in runs]), np.log([run.tokens for run in runs])
        self._means = sizes.mean(), tokens.mean()
        self._sizes, self._tokens = sizes - sizes.mean(), tokens - tokens.mean()

    def starts(self) -> list[np.ndarray]:
        """A grid: how the mean loss is shared among the three terms, and the exponents."""
        level = self.log_loss.mean()
        shares = [(0.8, 0.1, 0.1), (0.4, 0.3, 0.3), (0.1, 0.3, 0.6), (0.1, 0.6, 0.3), (0.4, 0.1, 0.5)]
        return [
            np.array([*(level + np.log(share)), alpha, beta])
            for share, alpha, beta in itertools.product(shares, (0.2, 0.5), (0.2, 0.5))
        ]

    def predicted(self, solution: np.ndarray) -> np.ndarray:
        """Log loss of each run."""
        irreducible, of_size, of_tokens, alpha, beta = solution
        found: np.ndarray = np.logaddexp(
            irreducible, np.logaddexp(of_size - alpha * self._sizes, of_tokens - beta * self._tokens)
        )
        return found

    def solve(self, starts: Sequence[np.ndarray], log_loss: np.ndarray, prior: np.ndarray, noise: float) -> np.ndarray:
        """The best of those that the starts lead to."""
        level = float(log_loss.mean())
        low = [level - 10, level - 10, level - 10, 0.01, 0.01]
        high = [level + 3, level + 3, level + 3, 2.0, 2.0]

        def misfit(solution: np.ndarray) -> np.ndarray:
            of_runs = (self.predicted(solution) - log_loss) / noise
            return np.concatenate([of_runs, (solution[3:] - prior) / EXPONENT_SPREAD])

        found = [
            least_squares(misfit, np.clip(start, low, high), bounds=(low, high), loss="huber", f_scale=HUBER)
            for start in starts
        ]
        solution: np.ndarray = min(found, key=lambda each: each.cost).x
        return solution

    def law(self, solution: np.ndarray) -> ScalingLaw:
        irreducible, of_size, of_tokens, alpha, beta = map(float, solution)
        size, tokens = self._means
        return ScalingLaw(
            E=float(np.exp(irreducible)),
            A=float(np.exp(of_size + alpha * size)),
            alpha=alpha,
            B=float(np.exp(of_tokens + beta * tokens)),
            beta=beta,
        )
