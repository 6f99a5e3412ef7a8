"""Parquet into typed frames. Columns that nobody reads are not read, so that nothing in them can matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet

from twinloop.common.errors import UserError
from twinloop.domains.record_types import RecordType
from twinloop.records.forms import UnusableError, form_fields
from twinloop.records.rows import (
    LINE,
    Rows,
    as_json,
    complete,
    examined,
    known_fields,
    numbered,
    python_type,
    unread_fields,
    with_repairs,
)

BROKEN = (
    *(pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException),
    *(OverflowError, UnicodeDecodeError),
)
"""What pyarrow and polars raise for bytes that are no Parquet, or for one of a kind that they cannot hold."""


def read_parquet(path: Path, record: RecordType) -> Iterator[Rows]:
    """One frame for each row group, so that a large file is never whole in memory twice."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
        ignored = set(file.schema_arrow.names) - set(_read_columns(file, record))
        for first, table in _row_groups(file, record):
            rows = _table(table, first, record)
            yield replace(rows, ignored=rows.ignored | ignored)
    except BROKEN as error:
        raise _unreadable(path, error) from None
    except OSError as error:
        if error.errno is not None:  # Arrow raises it without one, for bytes that it cannot read
            raise
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:200]})")


def original_rows(path: Path, lines: set[int], record: RecordType) -> dict[int, bytes]:
    """The given rows, as the JSON of the columns that are read."""
    return {
        number: original
        for first, table in _row_groups(pyarrow.parquet.ParquetFile(path), record)
        for number, original, _ in _rows(table, sorted(lines & set(range(first, first + len(table)))), first)
    }


def _read_columns(file: pyarrow.parquet.ParquetFile, record: RecordType) -> list[str]:
    names = file.schema_arrow.names
    others = frozenset() if "messages" in names else form_fields(record)
    return [name for name in names if name in record.columns or name in others]


def _row_groups(file: pyarrow.parquet.ParquetFile, record: RecordType) -> Iterator[tuple[int, pa.Table]]:
    """Number of the first row, and the columns that are read."""
    columns = _read_columns(file, record)
    for name in columns:
        if columns.count(name) > 1:
            raise pa.ArrowInvalid(f"two columns are named {name}")
    first = 1
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=columns).select(columns)  # "text" also reads a column "text.x"
        table = pa.Table.from_arrays(table.columns, names=columns)  # without metadata, over which polars panics
        table.validate(full=True)
        yield first, table
        first += table.num_rows


def _table(table: pa.Table, first: int, record: RecordType) -> Rows:
    fits = all(
        _fits(table.schema.field(name).type, dtype) if name in table.schema.names else record.nullable(name)
        for name, dtype in record.columns.items()
    )
    if fits:
        ignored = set(unread_fields(_names(pa.struct(table.schema)), known_fields(record)))
        frame = numbered(table.select([name for name in record.columns if name in table.schema.names]), first, record)
        gaps = frame.filter(~complete(record))[LINE].to_list()
        return with_repairs(frame, examined(_rows(table, gaps, first), record), ignored)
    return examined(_rows(table, range(first, first + table.num_rows), first), record)


def _rows(table: pa.Table, numbers: Iterable[int], first: int) -> Iterator[tuple[int, bytes, Callable[[], Any]]]:
    for number in numbers:
        row, problem = _row(table.slice(number - first, 1))
        yield number, as_json(row).encode(errors="replace"), partial(_value, row, problem)


def _row(table: pa.Table) -> tuple[dict[str, Any], str | None]:
    """The one row of a table, and why a value of it cannot be used."""
    try:
        [row] = table.to_pylist()
        return row, None
    except (ValueError, OverflowError, KeyError):  # a date beyond Python's, a time zone that is none, a field twice
        row, problem = {}, None
        for name, column in zip(table.column_names, table.columns, strict=True):
            try:
                row[name] = column[0].as_py()
            except (ValueError, OverflowError, KeyError):
                row[name] = None
                problem = problem or f"{name} is {column.type} with a value that cannot be read"
        return row, problem


def _value(row: dict[str, Any], problem: str | None) -> dict[str, Any]:
    if problem:
        raise UnusableError(problem)
    return dict(row)


def _fits(have: pa.DataType, want: Any) -> bool:
    """Whether a column can become the wanted one without a change of meaning: "8" is not 8."""
    types = pa.types
    if types.is_dictionary(have):
        return _fits(have.value_type, want)
    if isinstance(want, pl.Struct):
        if not types.is_struct(have):
            return False
        fields = {have.field(i).name: have.field(i).type for i in range(have.num_fields)}
        return all(part.name in fields and _fits(fields[part.name], part.dtype) for part in want.fields)
    if isinstance(want, pl.List):
        return (types.is_list(have) or types.is_large_list(have)) and _fits(have.value_type, want.inner)
    kind = python_type(want)
    if kind is str:
        return types.is_string(have) or types.is_large_string(have) or types.is_string_view(have)
    if kind is bool:
        return types.is_boolean(have)
    return (types.is_integer(have) and have != pa.uint64()) or (kind is float and types.is_floating(have))


def _names(have: pa.DataType) -> dict[str, Any]:
    """The names of a type's fields, each with those inside it."""
    if pa.types.is_list(have) or pa.types.is_large_list(have):
        return _names(have.value_type)
    return {field.name: _names(field.type) for field in have} if pa.types.is_struct(have) else {}
