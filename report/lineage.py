"""The lineage of a version as a figure: what was made from what, top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinloop.report.drawing import COLOURS, INK, Panel
from twinloop.report.story import Stage, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.6
"""Height of a box and the arrow below it, in inches."""
MAIN, SIDE = 0.3, 0.8
"""Where the boxes of a column have their middle; the side column holds what the version itself was not made from."""
HALF_WIDTH = {MAIN: 0.28, SIDE: 0.19}
HALF_HEIGHT = 0.29
DIGEST = 10


@dataclass(frozen=True)
class _Made:
    """What a stage made, and from which stages' artifacts. words: in its box."""

    name: str
    words: tuple[str, str]
    inputs: tuple[str, ...]

    @classmethod
    def by(cls, stage: Stage) -> _Made:
        version = f" · version {stage.version}" if stage.version else ""
        return cls(stage.name, (f"{stage.name}{version}", _short(stage.digest)), stage.inputs)


def lineage_panel(story: Story) -> Panel:
    """Boxes with content hashes; an arrow from each artifact to what was made from it."""
    made = [_Made.by(stage) for stage in story.stages if stage.key]
    exports = [each for each in made if each.name.startswith("export")]
    # What checks something, or exports what is not served: the first export is.
    side = [each for each in made if each.name in ("check", "audit", "parity") or each in exports[1:]]
    main = [each for each in made if each not in side]
    version = f"{story.model} version {story.version}", f"gate: {story.gate.decision}"
    data = _short(story.dataset_digest), main, side, version
    return Panel("Lineage", _draw, data, 0.5 + ROW * (len(main) + 2))


def _short(digest: str | None) -> str:
    return (digest or "")[:DIGEST]


def _draw(axes: Axes, data: str, main: Sequence[_Made], side: Sequence[_Made], version: tuple[str, str]) -> None:
    _box(axes, MAIN, 0, "data", data)
    rows = {stage.name: row for row, stage in enumerate(main, 1)}
    for stage in main:
        _box(axes, MAIN, rows[stage.name], *stage.words)
        _arrow(axes, (MAIN, rows[stage.name] - HALF_HEIGHT - 0.4), (MAIN, rows[stage.name] - HALF_HEIGHT))
    last = len(main) + 1
    _box(axes, MAIN, last, *version, COLOURS[1])
    _arrow(axes, (MAIN, last - HALF_HEIGHT - 0.4), (MAIN, last - HALF_HEIGHT))
    right, left = MAIN + HALF_WIDTH[MAIN], SIDE - HALF_WIDTH[SIDE]
    for stage in side:
        needed_by = [rows[each.name] for each in main if stage.name in each.inputs]
        source = next((rows[name] for name in reversed(stage.inputs) if name in rows), 1)
        if needed_by:  # beside what it is for
            _box(axes, SIDE, needed_by[0], *stage.words)
            _arrow(axes, (left, needed_by[0]), (right, needed_by[0]))
        else:  # below and beside what it was made from
            row = source if stage.name == "check" else source + 1
            _box(axes, SIDE, row, *stage.words)
            _arrow(axes, (right, source), (left, row))
    axes.set(xlim=(0, 1), ylim=(last + 0.5, -0.5))
    axes.axis("off")


def _box(axes: Axes, x: float, y: float, head: str, below: str, colour: str = COLOURS[0]) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner, size = (x - HALF_WIDTH[x], y - HALF_HEIGHT), (2 * HALF_WIDTH[x], 2 * HALF_HEIGHT)
    style = "round,pad=0,rounding_size=0.02"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, mutation_aspect=8, facecolor="none", edgecolor=colour))
    axes.text(x, y - 0.12, head, ha="center", va="center", fontsize=8)
    axes.text(x, y + 0.13, below, ha="center", va="center", fontsize=7, family="monospace")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
