"""What a lifecycle came to: its stages, the gate's report, the promotion, and what the champion answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twinloop.domains.domain import Domain
from twinloop.evaluation.gate import GateReport
from twinloop.flows.answer import Answer
from twinloop.registry.promotion import Promotion
from twinloop.registry.snapshot import Version
from twinloop.report.rows import StageRow


@dataclass(frozen=True)
class Publication:
    """What became of a candidate in the registry. error: why the registry would not promote what the gate passed.
    moved: whether it became champion by this run; False where it was champion already."""

    version: Version
    promotion: Promotion | None
    error: str | None
    moved: bool = False
    rows: tuple[StageRow, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a lifecycle came to. serve_error: why the server that was started on the champion did not answer."""

    domain: Domain
    rows: tuple[StageRow, ...]
    gate: GateReport
    published: Publication
    answer: Answer | None = None
    serve_error: str | None = None
    report: Path | None = None
    """The page that shows it all."""

    @property
    def failure(self) -> str | None:
        """What keeps this from being a champion that answers, in one line."""
        if self.published.promotion is None:
            return self.published.error or f"gate: {self.gate.decision}; {self.published.version} is not promoted"
        return self.serve_error
