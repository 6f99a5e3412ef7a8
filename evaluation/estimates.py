"""Numbers over all cases with their 95% intervals: Wilson's for shares, a bootstrap over the cases for all others."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain, Judged, domain_code
from twinloop.evaluation.metrics import Estimate, wilson_interval

RESAMPLES = 1000
"""Enough for the ends of a 95% interval: 25 of them lie beyond each."""
BOOTSTRAP_SEED = 0
"""The same cases and answers have the same interval on every day."""
AT_ONCE = 2**22
"""Counts that are drawn at a time, so that many cases take little memory."""


def measured(domain: Domain, judged: Sequence[Judged]) -> dict[str, Estimate]:
    """The domain's own metrics of all cases. One that cannot be computed is left out.

    Raises UserError where the domain's code raises, or returns what is no finite number.
    """
    with domain_code(domain, "measure"):
        values = dict(domain.measure(judged))
    found = {name: Estimate(value=_finite(domain, "measure", name, value)) for name, value in values.items()}
    for name, metric in domain.metrics.items():
        if metric.of is None:
            continue
        if name in values:
            raise UserError(
                f"domain {domain.name}: measure returned {name}, which is a Statistic in `metrics`; leave it out in one"
            )
        with domain_code(domain, f"metric {name}"):
            terms = [each for case in judged if (each := metric.of.terms(case)) is not None]
            bounds = (0.0, 1.0) if metric.share else metric.of.range
            estimate = estimated(terms, metric.of.value, mean=metric.of.mean, bounds=bounds)
        if estimate is not None:
            for number in (estimate.value, *(estimate.interval or ())):
                _finite(domain, "value", name, number)
            found[name] = estimate
    return found


def estimated(
    terms: Sequence[Mapping[Any, float]],
    value: Callable[[Mapping[Any, float]], float | None],
    *,
    mean: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Estimate | None:
    """The `value` of the sums of these cases' terms; all as in domains.domain.Statistic, bounds its `range`,
    which is 0 to 1 where a metric is a share.

    None where they give no number. One case gives no interval, unless it is a mean or has bounds.
    """
    names = list(dict.fromkeys(name for each in terms for name in each))
    table_NT = np.array([[each.get(name, 0.0) for name in names] for each in terms], np.float64)
    if not table_NT.size:
        return None

    def of_sums(sums_T: Sequence[float]) -> float | None:
        return value(dict(zip(names, sums_T, strict=True)))

    found = of_sums([math.fsum(column) for column in table_NT.T])
    if found is None:
        return None
    if mean:
        return Estimate(value=found, interval=wilson_interval(min(found, 1.0) * len(terms), len(terms)))
    if len(terms) < 2 and bounds is None:
        return Estimate(value=found)
    drawn = [each for sums_T in _resampled(table_NT).tolist() if (each := of_sums(sums_T)) is not None]
    # The percentile interval (Efron, 1979). A statistic that is biased in small samples may lie outside of it.
    low, high = np.percentile([found, *drawn], [2.5, 97.5]).tolist()
    if bounds is not None:
        # Drawing from cases that are all alike gives no spread. Of cases like these there may be as many others as
        # Wilson's interval leaves below a share of 1, and each of them may be the worst there can be.
        least, most = bounds
        unseen = 1 - wilson_interval(len(terms), len(terms))[0]
        low = max(least, min(low, most - unseen * (most - least)))
        high = min(most, max(high, least + unseen * (most - least)))
    return Estimate(value=found, interval=(min(low, found), max(high, found)))


def _resampled(table_NT: np.ndarray) -> np.ndarray:
    """Sums [RESAMPLES, T] over as many cases as there are, drawn with replacement."""
    count = len(table_NT)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    sums = []
    step = max(1, AT_ONCE // count)
    for start in range(0, RESAMPLES, step):
        draws = rng.integers(count, size=(min(step, RESAMPLES - start), count))
        weights = np.stack([np.bincount(row, minlength=count) for row in draws])
        sums.append(weights @ table_NT)
    return np.concatenate(sums)


def _finite(domain: Domain, function: str, name: str, value: Any) -> float:
    """function: of the domain, which returned it."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(
            f"domain {domain.name}: {function} returned {value!r} as {name}, which is no finite number; leave out a "
            "metric that cannot be computed"
        )
    return float(value)
