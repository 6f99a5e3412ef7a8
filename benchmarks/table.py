"""One Markdown table, whatever was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """must_be: what the project promises of the value, and whether it holds here; empty where nothing is promised."""

    what: str
    setting: str
    value: str
    unit: str
    must_be: str = ""


def markdown(rows: Sequence[Row]) -> str:
    heads = ("what", "setting", "value", "unit", "must be")
    lines = [heads, ("---",) * len(heads), *((r.what, r.setting, r.value, r.unit, r.must_be) for r in rows)]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def promise(demand: str, holds: bool) -> str:
    """A cell of `must be`."""
    return f"{demand}: {'yes' if holds else '**no**'}"


def percent(share: float) -> str:
    return f"{100 * share:.2f}" if share < 0.1 else f"{100 * share:.1f}"
