"""One set of metrics of several processes: counts and times are added up, and so is what is so now, but for the few
values that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

SHARED = frozenset({"twinloop_champion_refused", "twinloop_degraded", "twinloop_documents"})
"""Gauges of which the largest value is that of all."""
SHARES = frozenset({"twinloop:kv_cache_usage_perc"})
"""Gauges of which the mean is that of all: each process has as much of what they are shares of."""

Labels = tuple[tuple[str, str], ...]


def sum_of(reports: Iterable[Iterable[Metric]]) -> list[Metric]:
    """The families of all reports; each report is what `collect` gave in one process."""
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, Labels], list[float]]] = {}
    for report in reports:
        for family in report:
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            found = values.setdefault(family.name, {})
            for sample in family.samples:
                found.setdefault((sample.name, tuple(sorted(sample.labels.items()))), []).append(sample.value)
    for name, family in families.items():
        family.samples = [
            Sample(sample, dict(labels), _combined(name, each)) for (sample, labels), each in values[name].items()
        ]
    return list(families.values())


def kept(report: Iterable[Metric]) -> list[Metric]:
    """What of a report stays true when its process has ended: a count never falls."""
    return [family for family in report if family.type != "gauge"]


def _combined(name: str, values: Sequence[float]) -> float:
    if name in SHARED:
        return max(values)
    return sum(values) / (len(values) if name in SHARES else 1)
