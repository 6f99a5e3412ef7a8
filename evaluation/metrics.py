"""The numbers that answers and checkpoints are judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

Z_95 = 1.959963985
"""Standard normal quantile of a two-sided 95% interval."""


def wilson_interval(successes: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Confidence interval of a rate (Wilson, 1927), within [0, 1]; (0, 1) when nothing was tried.

    Unlike the normal interval it keeps its coverage near 0 and 1, where the rates of good models are. `successes` may
    be a sum of values from 0 to 1: no variable in this range varies more than one that is 0 or 1, so the interval of
    their mean is at least as wide as it must be.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    rate, spread = successes / n, z * z / n
    centre = rate + spread / 2
    margin = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    # The bounds at 0 and n successes are exactly 0 and 1; rounding must not move them.
    low = 0.0 if successes == 0 else max(0.0, (centre - margin) / (1 + spread))
    high = 1.0 if successes == n else min(1.0, (centre + margin) / (1 + spread))
    return low, high


class Rate(BaseModel):
    """So many successes of so many trials."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    successes: int = Field(ge=0)
    total: int = Field(ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Rate:
        if self.successes > self.total:
            raise ValueError(f"{self.successes} successes of {self.total} trials")
        return self

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Rate:
        return cls(successes=sum(outcomes), total=len(outcomes))

    @property
    def rate(self) -> float:
        """NaN when nothing was tried: no trial is not a failure, and not a success either."""
        return self.successes / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval."""
        return wilson_interval(self.successes, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        shown = f"{self.rate:.1%}" if self.total else "none"
        return f"{shown} [{low:.1%}, {high:.1%}] ({self.successes}/{self.total})"


class Estimate(BaseModel):
    """A number and its 95% interval; None where no interval is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    interval: tuple[float, float] | None = None

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.value, *(self.interval or ()))))

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"


def bits_per_byte(nats: float, bytes: int) -> float:
    """Total loss in nats over text of so many UTF-8 bytes: comparable across tokenizers, as perplexity is not."""
    if bytes < 1:
        raise ValueError("bits per byte of no text")
    return nats / math.log(2) / bytes


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean loss a token; infinite where that overflows."""
    if tokens < 1:
        raise ValueError("perplexity of no tokens")
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest measured value that at least `share` of the values do not exceed (nearest rank)."""
    if not values or not 0 < share <= 1:
        raise ValueError(f"percentile {share} of {len(values)} values")
    # 0.95 * 20 is 19.000000000000004 in floats on some shares: rounding keeps the rank that was meant.
    return sorted(values)[math.ceil(round(share * len(values), 9)) - 1]


def sign_test(worse: int, better: int) -> float:
    """One-sided p-value that `worse` of the cases that changed are as many by chance (exact McNemar test)."""
    changed = worse + better
    return sum(math.comb(changed, k) for k in range(worse, changed + 1)) / 2**changed
