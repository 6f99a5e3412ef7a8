"""The lineage of a version as a figure: what was made from what, top to bottom."""

from __future__ import annotations

from functools import partial
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


def lineage_panel(story: Story) -> Panel:
    """Boxes with content hashes; an arrow from each artifact to what was made from it."""
    made = [stage for stage in story.stages if stage.key]
    main = [stage for stage in made if not _is_beside(stage, made)]
    return Panel("Lineage", partial(_draw, story, made, main), 0.5 + ROW * (len(main) + 2))


def _is_beside(stage: Stage, made: list[Stage]) -> bool:
    """Whether the stage checks something, or exports what is not served: the first export is."""
    exports = [each for each in made if each.name.startswith("export")]
    return stage.name in ("check", "audit") or stage in exports[1:]


def _draw(story: Story, made: list[Stage], main: list[Stage], axes: Axes) -> None:
    _box(axes, MAIN, 0, "data", (story.dataset_digest or "")[:DIGEST])
    rows = {stage.name: row for row, stage in enumerate(main, 1)}
    for stage in main:
        _box(axes, MAIN, rows[stage.name], *_words(stage))
        _arrow(axes, (MAIN, rows[stage.name] - HALF_HEIGHT - 0.4), (MAIN, rows[stage.name] - HALF_HEIGHT))
    last = len(main) + 1
    _box(axes, MAIN, last, f"{story.model} version {story.version}", f"gate: {story.gate.decision}", COLOURS[1])
    _arrow(axes, (MAIN, last - HALF_HEIGHT - 0.4), (MAIN, last - HALF_HEIGHT))
    right, left = MAIN + HALF_WIDTH[MAIN], SIDE - HALF_WIDTH[SIDE]
    for stage in (each for each in made if each not in main):
        needed_by = [rows[each.name] for each in main if stage.name in each.inputs]
        source = next((rows[name] for name in reversed(stage.inputs) if name in rows), 1)
        if needed_by:  # beside what it is for
            _box(axes, SIDE, needed_by[0], *_words(stage))
            _arrow(axes, (left, needed_by[0]), (right, needed_by[0]))
        else:  # below and beside what it was made from
            row = source if stage.name == "check" else source + 1
            _box(axes, SIDE, row, *_words(stage))
            _arrow(axes, (right, source), (left, row))
    axes.set(xlim=(0, 1), ylim=(last + 0.5, -0.5))
    axes.axis("off")


def _words(stage: Stage) -> tuple[str, str]:
    version = f" · version {stage.version}" if stage.version else ""
    return f"{stage.name}{version}", (stage.digest or "")[:DIGEST]


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
