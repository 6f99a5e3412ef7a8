"""Figures that are drawn once: what was drawn is kept, and drawn anew where its data or its code have changed.

    state/figures/<model>/<key>.svg, .png

To draw all figures of a lifecycle takes 5 s of CPU, and one that skipped every stage has those of before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic_core import to_json

from twinloop.common.files import write_whole
from twinloop.registry.fingerprint import fingerprint
from twinloop.report.drawing import Panel, png, svg
from twinloop.report.figures import figures
from twinloop.report.story import Story

DRAWING = "twinloop.report.drawing"


@dataclass(frozen=True)
class Figures:
    """The panels of each figure by its name, and the folder of what was drawn."""

    panels: Mapping[str, Sequence[Panel]]
    folder: Path

    def svgs(self, name: str) -> list[str]:
        """A figure's panels, each as an element of a page."""
        return [self._kept("svg", [panel]).decode() for panel in self.panels[name]]

    def png(self, name: str) -> bytes:
        """A figure as one picture."""
        return self._kept("png", self.panels[name])

    def drop_others(self) -> None:
        """Remove what was drawn of other figures of this model: of versions before."""
        named = {self._path("png", panels) for panels in self.panels.values()}
        named |= {self._path("svg", [panel]) for panels in self.panels.values() for panel in panels}
        for path in self.folder.iterdir():
            if path not in named:
                path.unlink(missing_ok=True)

    def _kept(self, kind: str, panels: Sequence[Panel]) -> bytes:
        path = self._path(kind, panels)
        if path.is_file():
            return path.read_bytes()
        drawn = png(panels) if kind == "png" else svg(panels[0]).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, drawn)
        return drawn

    def _path(self, kind: str, panels: Sequence[Panel]) -> Path:
        code = fingerprint(DRAWING, *sorted({each.draw.__module__ for each in panels}))
        shown = [(each.title, each.height, each.draw.__qualname__, each.data) for each in panels]
        key = hashlib.sha256(to_json([kind, code, version("matplotlib"), shown]))
        return self.folder / f"{key.hexdigest()}.{kind}"


def kept_figures(project: Path, story: Story) -> Figures:
    """The figures of a story."""
    return Figures(figures(story), project / "state" / "figures" / story.model)
