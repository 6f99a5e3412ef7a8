"""One Markdown table, whatever was measured, and the line above it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from twinloop.registry.tracking import code_version

HEADS = ("what", "setting", "value", "unit", "must be")


@dataclass(frozen=True)
class Row:
    """must_be: what the project promises of the value, and whether it holds here; empty where nothing is promised."""

    what: str
    setting: str
    value: str
    unit: str
    must_be: str = ""


def heading(where: str, *what: str) -> str:
    """When, by which code, where and on what: enough to compare two tables, or not to."""
    code = code_version(Path.cwd())
    commit = f"{(code.commit or 'unknown')[:12]}{' with changes' if code.dirty else ''}"
    before = f"{date.today()}, commit {commit}", f"{where}, load {os.getloadavg()[0]:.1f} before"
    return "; ".join((*before, *what))


def show(rows: Iterable[Row]) -> None:
    """Print the table, each row as soon as it is measured: a run that is cut off has not measured in vain."""
    for cells in (HEADS, ("---",) * len(HEADS)):
        print(_line(cells), flush=True)
    for row in rows:
        print(_line((row.what, row.setting, row.value, row.unit, row.must_be)), flush=True)


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def promise(demand: str, holds: bool) -> str:
    """A cell of `must be`."""
    return f"{demand}: {'yes' if holds else '**no**'}"


def percent(share: float) -> str:
    return f"{100 * share:.2f}" if share < 0.1 else f"{100 * share:.1f}"
