"""Reads the files of a record type into one typed frame and loses no row: each is in the frame, or rejected with a
reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import polars as pl

from twinloop.common.errors import UserError, one_line
from twinloop.domains.record_types import RecordType
from twinloop.records.jsonl import read_jsonl
from twinloop.records.opening import open_lines
from twinloop.records.parquet import original_rows, read_parquet
from twinloop.records.rows import LINE, Rows, frame_of


@dataclass(frozen=True)
class Source:
    """The files that hold a record type's rows, which are numbered on through all of them, from 1.

    rows: how many each file has. folder: the data folder, in which files are named.
    """

    folder: Path
    paths: tuple[Path, ...]
    rows: tuple[int, ...]

    def __str__(self) -> str:
        others = len(self.paths) - 1
        return f"{self.paths[0]}{f' and {others} more' if others else ''}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(path.relative_to(self.folder).as_posix() for path in self.paths)

    def place(self, number: int) -> tuple[int, int]:
        """The index of the file that the row of this number is in, and its line there."""
        for index, end in enumerate(accumulate(self.rows)):
            if number <= end:
                return index, number - end + self.rows[index]
        raise IndexError(number)

    def line(self, number: int) -> str:
        """Such as "line 7", or "line 7 of chat_2.jsonl" where there are several files."""
        index, line = self.place(number)
        return f"line {line}" + (f" of {self.names[index]}" if len(self.paths) > 1 else "")


def read_files(folder: Path, paths: Sequence[Path], record: RecordType) -> tuple[Rows, Source]:
    """Read files of `folder` in their order, as one. Raises UserError for one that cannot be read."""
    parts: list[Rows] = []
    counts: list[int] = []
    for path in paths:
        rows = read_rows(path, record)
        parts.append(_moved(rows, sum(counts)))
        counts.append(len(rows.frame) + len(rows.rejected))
    return _joined(parts, record), Source(folder, tuple(paths), tuple(counts))


def read_rows(path: Path, record: RecordType) -> Rows:
    """Read one file, Parquet by its ending or else JSON lines. Raises UserError when it is neither, or cannot be
    opened."""
    try:
        parts = list(read_parquet(path, record) if path.suffix == ".parquet" else read_jsonl(path, record))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    return _joined(parts, record)


def original_lines(source: Source, numbers: set[int], record: RecordType) -> dict[int, bytes]:
    """The rows of these numbers as they are in their files; a Parquet row as the JSON of the columns that are read."""
    found: dict[int, bytes] = {}
    before = 0
    for path, count in zip(source.paths, source.rows, strict=True):
        lines = {number - before for number in numbers if before < number <= before + count}
        if lines:
            found |= {before + line: original for line, original in _original_lines(path, lines, record).items()}
        before += count
    return found


def _original_lines(path: Path, lines: set[int], record: RecordType) -> dict[int, bytes]:
    if path.suffix == ".parquet":
        return original_rows(path, lines, record)
    with open_lines(path) as file:
        return {number: line.rstrip(b"\r\n") for number, line in enumerate(file, 1) if number in lines}


def _moved(rows: Rows, by: int) -> Rows:
    """The rows with larger numbers."""
    if not by:
        return rows
    rejected = tuple(replace(one, line=one.line + by) for one in rows.rejected)
    return Rows(rows.frame.with_columns(pl.col(LINE) + by), rejected, rows.ignored)


def _joined(parts: Sequence[Rows], record: RecordType) -> Rows:
    frame = pl.concat([part.frame for part in parts]) if parts else frame_of([], [], record)
    rejected = tuple(one for part in parts for one in part.rejected)
    return Rows(frame, rejected, frozenset().union(*(part.ignored for part in parts)))
