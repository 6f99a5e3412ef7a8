"""What the project promises of its speed beside its peers', and the rows that show a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.table import Row, promise

OURS = "twinloop"
LLAMA, GENAI, CTRANSLATE2 = "llama.cpp", "onnxruntime-genai", "ctranslate2"


@dataclass(frozen=True)
class Goal:
    """At least so many times what the best peer does, or the peer of that name."""

    times: float
    peer: str = ""


@dataclass
class Comparison:
    """One measure of all contestants, a value for each round. less: the smaller value is the better one.

    missing: by contestant, why it has no values.
    """

    what: str
    setting: str
    unit: str
    goals: Sequence[Goal] = ()
    less: bool = False
    values: dict[str, list[float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def rows(self) -> Iterator[Row]:
        """Medians of the rounds; ratios are the median of each round's own ratio, with the range of all rounds."""
        for name, values in self.values.items():
            shown = f"{statistics.median(values):,.1f}"
            yield Row(self.what if name.startswith(OURS) else f"· {name}", self.setting, shown, self.unit)
        for name, reason in self.missing.items():
            yield Row(self.what if name.startswith(OURS) else f"· {name}", self.setting, "missing", reason)
        for goal in self.goals:
            yield self._ratio_row(goal)

    def _ratio_row(self, goal: Goal) -> Row:
        to = goal.peer or "the best of them"
        ours = next((values for name, values in self.values.items() if name.startswith(OURS)), [])
        peers = [name for name in self.values if not name.startswith(OURS) and name.startswith(goal.peer)]
        if not ours or not peers:
            return Row(f"· ratio to {to}", self.setting, "not measured", "", f"at least {goal.times}: not measured")
        ratios = min((self._ratios(ours, self.values[name]) for name in peers), key=statistics.median)
        ratio = statistics.median(ratios)
        spread = f"{self.setting}; range of {len(ratios)}: {min(ratios):.2f} to {max(ratios):.2f}"
        holds = ratio >= goal.times
        return Row(f"· ratio to {to}", spread, f"{ratio:.2f}", "times", promise(f"at least {goal.times}", holds))

    def _ratios(self, ours: list[float], theirs: list[float]) -> list[float]:
        """Of each round, above 1 where we are better."""
        pairs = zip(ours, theirs, strict=False)  # a peer may have failed in a later round
        return [their / our if self.less else our / their for our, their in pairs]
