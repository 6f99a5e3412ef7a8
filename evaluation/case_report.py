"""What cases showed of a model, as it is kept: rates, every failure whole, a few answers whatever they are worth."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from twinloop.evaluation.metrics import Estimate, Rate


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CaseResult(_Record):
    case_id: str
    kind: str
    pair_id: str | None
    passed: bool
    confidence: float | None = None
    """Probability of the whole greedy answer under the model; None where it was not recorded."""


class CaseSample(_Record):
    """An answer, whole. passed: None where the domain has no verifier."""

    case_id: str
    kind: str
    prompt: tuple[dict[str, str], ...]
    output: str
    passed: bool | None
    expected: dict[str, Any]


class CaseFailure(_Record):
    """A wrong answer, whole. `failed` names the predicates that do not hold; `owner` is the layer that looks at it."""

    case_id: str
    kind: str
    pair_id: str | None
    prompt: tuple[dict[str, str], ...] = ()
    output: str
    finish_reason: str
    failed: tuple[str, ...]
    reasons: tuple[str, ...]
    expected: dict[str, Any]
    owner: str
    next_action: str


class CaseReport(_Record):
    """What the cases showed. An unparsed answer fails every predicate, except critical ones that its verdict holds."""

    cases_digest: str
    """Equal for two reports on the same cases: only then are they comparable case by case."""
    overall: Rate
    by_kind: dict[str, Rate]
    pairs: dict[str, Rate]
    """Pairs by kind, of kinds that have them; a pair passes when both its sides do."""
    by_predicate: dict[str, Rate]
    violations: dict[str, int]
    """Answers, sampled ones too, by the critical predicate that they violate."""
    measured: dict[str, Estimate]
    """The domain's own metrics by name, and those of the reference answers and of held-out text."""
    details: dict[str, Any] = {}
    """What else the domain reports, such as a confusion matrix."""
    outcomes: dict[str, dict[str, int]] = {}
    """Greedy answers by the right outcome and the answered one, as the domain names outcomes."""
    unparsed: int
    truncated: int
    """Answers that ran into max_tokens."""
    results: tuple[CaseResult, ...]
    failures: tuple[CaseFailure, ...]
    samples: tuple[CaseSample, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a tracker."""
        rates = {"pass_rate": self.overall}
        rates |= {f"pairs/{kind}": rate for kind, rate in self.pairs.items()}
        rates |= {f"kind/{kind}": rate for kind, rate in self.by_kind.items()}
        rates |= {f"predicate/{name}": rate for name, rate in self.by_predicate.items()}
        numbers = {name: rate.rate for name, rate in rates.items() if rate.total}
        numbers |= {f"{name}_low": rate.interval[0] for name, rate in rates.items() if rate.total}
        numbers |= {f"violations/{name}": count for name, count in self.violations.items()}
        counts = {"cases": self.overall.total, "unparsed": self.unparsed, "truncated": self.truncated}
        numbers |= {name: estimate.value for name, estimate in self.measured.items()}
        for name, estimate in self.measured.items():
            if estimate.interval:
                numbers |= {f"{name}_low": estimate.interval[0], f"{name}_high": estimate.interval[1]}
        return numbers | counts


class Comparison(_Record):
    """Two models on the same cases: how many only the champion passes (lost), how many only the candidate (won)."""

    champion: str
    lost: int
    won: int
    total: int
