"""Small figures: PNG on a ground of their own, SVG in the colours of the page that they are in.

Knows matplotlib and nothing of models. matplotlib is imported when something is drawn: that takes a second.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.4, 3.0
"""Of a panel, in inches: one fills a telephone's screen, three a page's width."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A8A8A")
"""Okabe and Ito's, distinct for people with any colour vision, and grey; each is seen on white and on black."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#1a1b1c"
"""Of text and axes. In SVG the text colour of the page takes its place, so it is no colour that is used elsewhere."""
DOTS_PER_INCH = 130
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Panel:
    """A picture. title: what it shows, in a sentence's form. draw: puts `data`, which is all that it shows, on axes."""

    title: str
    draw: Callable[..., None]
    data: tuple[Any, ...]
    """What `draw` takes after the axes: plain values, that JSON can hold."""
    height: float = HEIGHT


def png(panels: Sequence[Panel]) -> bytes:
    """All panels on one white sheet, two beside each other: as wide as MLflow shows a picture without reducing it."""
    with _style():
        figure = _sheet(panels, columns=2)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return out.getvalue()


def svg(panel: Panel) -> str:
    """One panel as an element for a page: transparent, its text in the page's font and colour."""
    with _style():
        figure = _sheet([panel], columns=1)
        out = io.StringIO()
        # Without a date, and with names that follow from the content, the same story gives the same page.
        figure.savefig(out, format="svg", transparent=True, metadata=NO_METADATA)
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    for number, colour in enumerate(COLOURS):
        drawn = drawn.replace(colour.lower(), f"var(--figure-{number}, {colour})")
    return drawn


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    matplotlib.use("agg")
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "twinloop",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": INK,
        "grid.alpha": 0.15,
        "lines.linewidth": 1.4,
        "legend.frameon": False,
        "legend.fontsize": 8,
        **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
        **{f"axes.{name}": INK for name in ("edgecolor", "labelcolor", "titlecolor")},
    }
    with matplotlib.rc_context(settings):
        yield


def _sheet(panels: Sequence[Panel], *, columns: int) -> Figure:
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    heights = [max(panel.height for panel in panels[row * columns : (row + 1) * columns]) for row in range(rows)]
    figure = Figure(figsize=(WIDTH * columns, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        axes.set_title(panel.title)
        panel.draw(axes, *panel.data)
    return figure
