"""Answers to a case, judged as an evaluation does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twinloop.domains.domain import Domain, Judged


def judged(
    domain: Domain, facts: Any, *outputs: str, reference: str | None = None, confidence: float | None = None
) -> Judged:
    """outputs: the greedy answer, and where there are more, sampled ones behind it."""
    verdicts = [domain.verify(output, facts) for output in outputs]
    sampled: Sequence[int] = range(1, len(outputs)) if len(outputs) > 1 else [0]
    return Judged(
        kind="held_out",
        facts=facts,
        expected={},
        reference=reference,
        greedy=outputs[0],
        greedy_verdict=verdicts[0],
        confidence=confidence,
        outputs=[outputs[index] for index in sampled],
        verdicts=[verdicts[index] for index in sampled],
    )
