"""What a lifecycle came to: its stages, the gate's report, the promotion, and what the champion answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from twinloop.evaluation.gate import GateReport
from twinloop.flows.answer import Answer
from twinloop.registry.artifact import Artifact
from twinloop.registry.promotion import Promotion
from twinloop.registry.versions import Version
from twinloop.tasks.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One row of the final table. `measured` is what the checkpoint, or the bundle, can do.

    seconds: what the stage took, by this run or, where it is `reused`, by the run that made it.
    """

    name: str
    seconds: float | None
    artifact: Artifact | None = None
    measured: Artifact | None = None
    note: str = ""
    reused: bool = False


@dataclass
class Outcome:
    """What a lifecycle came to."""

    recipe: Recipe
    stages: list[Stage] = field(default_factory=list)
    gate: GateReport | None = None
    version: Version | None = None
    promotion: Promotion | None = None
    refusal: str | None = None
    """Why the registry would not promote what the gate had let through."""
    answer: Answer | None = None
    silence: str | None = None
    """Why the server that was started on the champion did not answer."""

    @property
    def shortfall(self) -> str | None:
        """What keeps this from being a champion that answers, in one line."""
        if self.promotion is None:
            decision = self.gate.decision if self.gate else "none"
            return self.refusal or f"gate: {decision}; {self.version} is not promoted"
        return self.silence
