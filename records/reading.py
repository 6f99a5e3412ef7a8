"""Reads JSONL and Parquet into typed frames and loses no row: each is in the frame, or rejected with a reason."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from twinloop.common.errors import UserError
from twinloop.domains.record_types import RecordType
from twinloop.records.jsonl import read_jsonl
from twinloop.records.parquet import original_rows, read_parquet
from twinloop.records.rows import Rows, frame_of

FORMATS = (".jsonl", ".parquet")


def data_files(folder: Path, name: str) -> list[Path]:
    """The files of one record type in `folder`: there should be one, in either format."""
    return [path for suffix in FORMATS if (path := folder / f"{name}{suffix}").is_file()]


def read_rows(path: Path, record: RecordType) -> Rows:
    """Read a .jsonl or .parquet file. Raises UserError when it is neither, or cannot be opened."""
    try:
        parts = list(read_parquet(path, record) if path.suffix == ".parquet" else read_jsonl(path, record))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    frame = pl.concat([part.frame for part in parts]) if parts else frame_of([], [], record)
    rejected = tuple(one for part in parts for one in part.rejected)
    return Rows(frame, rejected, frozenset().union(*(part.ignored for part in parts)))


def original_lines(path: Path, lines: set[int], record: RecordType) -> dict[int, bytes]:
    """These lines of a file, unchanged; a Parquet row as the JSON of the columns that are read."""
    if path.suffix == ".parquet":
        return original_rows(path, lines, record)
    with path.open("rb") as file:
        return {number: line.rstrip(b"\r\n") for number, line in enumerate(file, 1) if number in lines}
