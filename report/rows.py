"""The rows of the table that a lifecycle ends with, and of which its story is gathered."""

from __future__ import annotations

from dataclasses import dataclass

from twinloop.registry.artifact import Artifact


@dataclass(frozen=True)
class StageRow:
    """One row of the final table. `measured` is what the checkpoint, or the exported model, can do.

    seconds: what the stage took, by this run or, where it is `reused`, by the run that made it.
    """

    name: str
    seconds: float | None
    artifact: Artifact | None = None
    measured: Artifact | None = None
    note: str = ""
    reused: bool = False

    @classmethod
    def of(cls, artifact: Artifact, *, measured: Artifact | None = None, name: str = "", note: str = "") -> StageRow:
        """The row of a stage that made, or found, this artifact."""
        seconds, reused = artifact.manifest.seconds, artifact.reused
        return cls(name or artifact.stage, seconds, artifact, measured, note=note, reused=reused)
