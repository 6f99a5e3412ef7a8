"""Fields that nobody reads and whose names are near those of fields that are missing: most likely typing errors.

An optional field that is misspelt looks like one that was left out, and what would have been checked by it is not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import polars as pl
from pyarrow.parquet import read_schema

from twinloop.common.strict_json import NotJSONError, parse_json
from twinloop.domains.record_types import RecordType
from twinloop.records.findings import Finding
from twinloop.records.reading import Source, original_lines
from twinloop.records.rows import LINE, Rows, known_fields

LETTERS_A_MISTAKE = 4
"""A name is near another where no more than one letter in so many is wrong, missing, added or swapped."""


def misspelt_fields(source: Source, rows: Rows, record: RecordType) -> list[Finding]:
    """One finding for each unknown field in the place of a known one. rows: of `source`, as it was read."""
    known = known_fields(record)
    if not any(_near_in(name, known) for name in rows.ignored):
        return []
    seen: dict[tuple[str, str], set[int]] = {}
    numbers = {*rows.frame[LINE], *(one.line for one in rows.rejected)}
    for number, line in original_lines(source, numbers, record).items():
        for name, near in _misspelt(_parsed(line), known):
            if name in rows.ignored:
                seen.setdefault((name, near), set()).add(number)
    for name, near, some in _columns(source, rows, record):
        seen.setdefault((name, near), set()).update(some)
    return [
        Finding.of(source, sorted(some), len(numbers), f"have the unknown field {name} and no {near}: misspelt?")
        for (name, near), some in sorted(seen.items())
    ]


def _columns(source: Source, rows: Rows, record: RecordType) -> Iterator[tuple[str, str, range]]:
    """(unknown, known, rows) of Parquet's columns: those that nobody reads are in no original row."""
    end = 0
    for path, count in zip(source.paths, source.rows, strict=True):
        first, end = end + 1, end + count
        for name in rows.ignored.intersection(read_schema(path).names if path.suffix == ".parquet" else ()):
            near = nearest(name, record.columns)
            of_file = rows.frame.filter(pl.col(LINE).is_between(first, end))
            if near and of_file[near].is_null().all():
                yield name, near, range(first, end + 1)


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that `name` is most likely meant to be: letter case and signs aside it is the same, or nearly."""
    plain = _plain(name)
    distances = {other: _distance(plain, _plain(other)) for other in known}
    near = min(distances, key=lambda other: distances[other], default=None)
    return near if near is not None and distances[near] <= len(_plain(near)) // LETTERS_A_MISTAKE else None


def _near_in(name: str, known: Mapping[str, Any]) -> str | None:
    """The same for a dotted name; only the last part may be unknown."""
    *parents, last = name.split(".")
    for parent in parents:
        known = known.get(parent, {})
    near = nearest(last, known)
    return ".".join([*parents, near]) if near else None


def _misspelt(value: Any, known: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(unknown, known) dotted names, where the known field is missing or null beside the unknown one."""
    if isinstance(value, list):
        for item in value:
            yield from _misspelt(item, known, path)
    elif isinstance(value, dict):
        missing = [name for name in known if value.get(name) is None]
        for name, inner in value.items():
            if name in known:
                yield from _misspelt(inner, known[name], f"{path}{name}.")
            elif near := nearest(name, missing):
                yield path + name, path + near


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, NotJSONError):
        return None


def _plain(name: str) -> str:
    return re.sub(r"[^\w]|_", "", name).lower()


def _distance(one: str, other: str) -> int:
    """Letters to change, add, leave out, or swap with the next one (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        last, before, row = before, row, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
