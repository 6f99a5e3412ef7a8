"""What a scaling law, fitted on small runs, says about a budget: the size and the tokens that get most out of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from twinloop.common.errors import UserError
from twinloop.evaluation.scaling import (
    CHINCHILLA,
    Choice,
    Fit,
    Run,
    Size,
    best_choice,
    chinchilla_choice,
    fit_cost,
    fit_law,
    nearest_size,
    predict_largest,
)
from twinloop.tasks.other_processes import BUSY_CORES
from twinloop.tasks.scaling import Corpus, Measured

EPOCHS = 4
"""Up to so many repeats of a text are worth about as much as new text (Muennighoff et al., 2023)."""
FAR = 10
"""Times the compute of the largest small run, beyond which a prediction is doubtful, whatever its interval."""
DOUBTFUL = 0.03
"""Relative error of the largest run's loss, predicted from the others, beyond which the law does not hold."""

TIMES = {"s": 1, "min": 60, "h": 3600, "d": 86400}
COUNTS = {"k": 1e3, "M": 1e6, "B": 1e9}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([A-Za-z]*)\s*")
MOST = 1e30
"""Seconds, FLOPs or tokens that no plan is about: the largest trainings until 2025 took some 5e26 FLOPs."""


@dataclass(frozen=True)
class Budget:
    """amount: seconds, FLOPs or tokens."""

    kind: Literal["time", "flops", "tokens"]
    amount: float
    text: str

    def spent(self, choice: Choice) -> float:
        """By a choice whose size has its cost in this unit."""
        return choice.tokens * (1 if self.kind == "tokens" else choice.size.cost)

    def check_holds(self, run: Measured) -> None:
        """Raises UserError where this run, the smallest of a fit, takes more than the budget."""
        costs = {"time": run.seconds, "flops": run.flops, "tokens": 1.0}
        tokens = self.amount / costs[self.kind]
        if tokens < run.tokens:
            raise UserError(
                f"budget: {self.text} trains {run.parameters:,} weights on {tokens:,.0f} tokens, and the smallest "
                f"run of a fit already has {run.tokens:,}; give more, or smaller runs with --run-tokens"
            )


def parse_budget(text: str) -> Budget:
    """`2h`, `90min`, `3e15` (FLOPs) or `5M` (tokens). Raises UserError for anything else."""
    kinds: dict[Literal["time", "flops", "tokens"], Mapping[str, float]] = {
        "time": TIMES,
        "flops": {"": 1.0},
        "tokens": COUNTS,
    }
    for kind, units in kinds.items():
        if amount := _amount(text, units):
            return Budget(kind, amount, text)
    raise UserError(f"budget: {text!r}: give time (2h, 90min), FLOPs (3e15) or tokens (5M), of at most {MOST:g}")


def parse_tokens(text: str) -> int:
    """`500k`, `2M` or `500000`. Raises UserError for anything else."""
    amount = _amount(text, {"": 1.0, **COUNTS})
    if amount is None or amount < 1:
        raise UserError(f"run-tokens: {text!r}: give a number of tokens, such as 500k or 2M")
    return round(amount)


def _amount(text: str, units: Mapping[str, float]) -> float | None:
    """None for what is no number more than 0 with one of these units behind it."""
    found = AMOUNT.fullmatch(text)
    amount = float(found[1]) * units.get(found[2], 0) if found else 0
    return amount if 0 < amount <= MOST else None


@dataclass(frozen=True)
class ScalingPlan:
    """What the law says. choices: by what chose them. cost: of a token, in seconds, by its FLOPs."""

    corpus: Corpus
    runs: Sequence[Measured]
    budget: Budget
    fit: Fit
    choices: Mapping[str, Choice]
    cost: Callable[[float], float]

    @property
    def checked(self) -> tuple[Run, float] | None:
        """The largest run, and its loss as the others predict it."""
        return predict_largest(_for_fit(self.runs))

    def flops(self, choice: Choice) -> float:
        return self.corpus.shape(choice.size.depth).flops * choice.tokens

    def seconds(self, choice: Choice) -> float:
        return self.cost(self.corpus.shape(choice.size.depth).flops) * choice.tokens

    def notes(self) -> list[str]:
        """What makes the prediction doubtful."""
        found = []
        best, law = self.choices["best"], self.fit.law
        largest = max(each.flops * each.tokens for each in self.runs)
        if self.flops(best) > FAR * largest:
            times = self.flops(best) / largest
            found.append(
                f"the best choice takes {times:,.0f} times the compute of the largest run; longer runs "
                "(--run-tokens) make it surer"
            )
        checked = self.checked
        if checked and abs(checked[1] / checked[0].loss - 1) > DOUBTFUL:
            found.append(
                "the other runs do not predict the largest one: the loss falls in steps, as where a network "
                "finds how to copy or to compare, and no such law holds across one; take longer runs"
            )
        if best.tokens > EPOCHS * self.corpus.tokens:
            times = best.tokens / self.corpus.tokens
            found.append(
                f"the corpus has about {self.corpus.tokens:,} tokens: the best choice passes it {times:,.0f} "
                f"times, and beyond {EPOCHS} repeats are worth less than new text; the law does not know that"
            )
        recipe = self.choices["the recipe"]
        if recipe.loss(law) < best.loss(law):
            if self.budget.spent(recipe) > self.budget.amount:
                found.append("the recipe as it is gets a lower loss, by more than the budget holds")
            else:  # a budget of tokens: more weights lose less on them
                times = self.flops(recipe) / self.flops(best)
                found.append(
                    f"the recipe as it is gets a lower loss within the budget, by {times:.1f} times the compute of the "
                    "best choice"
                )
        if (busy := max(each.busy_cores for each in self.runs)) > BUSY_CORES:
            found.append(
                f"other processes used up to {busy:.1f} cores while the runs were timed: an idle machine does more in "
                "the same time"
            )
        return found


def plan_budget(corpus: Corpus, runs: Sequence[Measured], budget: Budget) -> ScalingPlan:
    """Fit the law to the runs, and choose by it. Raises UserError, see `fit_law`."""
    fit = fit_law(_for_fit(runs))
    cost = fit_cost([each.flops for each in runs], [each.seconds for each in runs])
    shapes = corpus.shapes()
    unit: Callable[[float], float] = cost if budget.kind == "time" else lambda flops: flops
    sizes = [Size(shape.depth, shape.parameters, unit(shape.flops)) for shape in shapes]
    if budget.kind == "tokens":  # more weights always lose less on them: the compute that they are worth decides
        amount = budget.amount
        best = Choice(nearest_size(sizes, fit.law.best_parameters(amount)), amount)
        rule = Choice(nearest_size(sizes, amount / CHINCHILLA), amount)
    else:
        best, rule = best_choice(fit.law, sizes, budget.amount), chinchilla_choice(sizes, budget.amount)
    own = corpus.shape(corpus.depth)
    as_it_is = Choice(Size(own.depth, own.parameters, unit(own.flops)), corpus.planned_tokens)
    choices = {"best": best, f"{CHINCHILLA} tokens a weight": rule, "the recipe": as_it_is}
    return ScalingPlan(corpus, runs, budget, fit, choices, cost)


def _for_fit(runs: Sequence[Measured]) -> list[Run]:
    return [Run(each.parameters, each.tokens, each.loss) for each in runs]
