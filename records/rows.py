"""What a row must be, whatever file it is in: typed columns, or rejected with a reason."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from twinloop.domains.record_types import RecordType
from twinloop.records.forms import UnusableError, to_standard

LINE = "line"
INT64 = range(-(2**63), 2**63)
TYPE_NAMES = {str: "text", bool: "boolean", int: "integer", float: "number", list: "list", dict: "object"}


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used. `line` counts from 1 (rows, in a Parquet file); on through several files."""

    line: int
    reason: str
    row: str
    """The line as in the file; bytes that are not UTF-8 are written as \\xNN."""
    base64: str | None = None
    """The line's bytes, where `row` cannot hold them."""


@dataclass(frozen=True)
class Rows:
    """What was read. `frame` has the record type's columns and LINE; every row is in it or in `rejected`."""

    frame: pl.DataFrame
    rejected: tuple[Rejected, ...] = ()
    ignored: frozenset[str] = frozenset()
    """Dotted names of fields that the record type does not know; they are left out of the frame."""


def rejected_line(number: int, reason: str, line: bytes) -> Rejected:
    try:
        return Rejected(number, reason, line.decode())
    except UnicodeDecodeError:
        return Rejected(number, reason, line.decode(errors="backslashreplace"), base64.b64encode(line).decode())


# --- rows one by one


def examined(rows: Iterable[tuple[int, bytes, Callable[[], Any]]], record: RecordType) -> Rows:
    """Rows looked at one by one: (line, the raw row, what gives its value)."""
    good: list[dict[str, Any]] = []
    numbers: list[int] = []
    rejected: list[Rejected] = []
    ignored: set[str] = set()
    known = known_fields(record)
    for number, original, value in rows:
        try:
            row = to_standard(value(), record)
            ignored.update(unread_fields(row, known))
            good.append(_typed(row, record))
            numbers.append(number)
        except UnusableError as problem:
            rejected.append(rejected_line(number, str(problem), original))
    return Rows(frame_of(good, numbers, record), tuple(rejected), frozenset(ignored))


def _typed(row: Any, record: RecordType) -> dict[str, Any]:
    """The row with just the record type's fields. Raises UnusableError for one that is missing or of another type."""
    if not isinstance(row, dict):
        raise UnusableError(f"not a JSON object but {_type_name(row)}")
    return {name: _value(row.get(name), dtype, name, record) for name, dtype in record.columns.items()}


def _value(value: Any, dtype: Any, path: str, record: RecordType) -> Any:
    if value is None:
        if record.nullable(path):
            return None
        raise UnusableError(f"{path} is missing")
    if isinstance(dtype, pl.Struct) and isinstance(value, dict):
        parts = {part.name: part.dtype for part in dtype.fields}
        return {name: _value(value.get(name), part, f"{path}.{name}", record) for name, part in parts.items()}
    if isinstance(dtype, pl.List) and isinstance(value, list):
        return [_value(item, dtype.inner, path, record) for item in value]
    if value in (math.inf, -math.inf):
        raise UnusableError(f"{path} is too large a number")
    wanted = python_type(dtype)
    if wanted is float and type(value) in (int, float):
        return _float(value, path)
    if type(value) is not wanted:
        raise UnusableError(f"{path} is {_type_name(value)}, not {TYPE_NAMES[wanted]}")
    if isinstance(value, int) and value not in INT64:
        raise UnusableError(f"{path} is too large a number")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UnusableError(f"{path} holds half of a surrogate pair") from None
    return value


def _float(value: float, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise UnusableError(f"{path} is too large a number") from None
    if math.isnan(number):
        raise UnusableError(f"{path} is NaN")
    return number


def _type_name(value: Any) -> str:
    return TYPE_NAMES.get(type(value), "null" if value is None else type(value).__name__)


def python_type(dtype: Any) -> type:
    if isinstance(dtype, pl.Struct):
        return dict
    if isinstance(dtype, pl.List):
        return list
    return {pl.String: str, pl.Boolean: bool, pl.Float64: float, pl.Int64: int}[dtype.base_type()]


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def known_fields(record: RecordType) -> dict[str, Any]:
    """The names of the record type's fields, each with those inside it: {"messages": {"role": {}, "content": {}}}."""
    return _inside(pl.Struct(dict(record.columns)))


def _inside(dtype: Any) -> dict[str, Any]:
    if isinstance(dtype, pl.List):
        return _inside(dtype.inner)
    return {part.name: _inside(part.dtype) for part in dtype.fields} if isinstance(dtype, pl.Struct) else {}


def unread_fields(value: Any, known: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted names of the fields in a parsed row that are not known."""
    if isinstance(value, list):
        for item in value:
            yield from unread_fields(item, known, path)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in known:
                yield path + name
            elif known[name]:
                yield from unread_fields(inner, known[name], f"{path}{name}.")


# --- frames


def numbered(table: pa.Table, first: int, record: RecordType) -> pl.DataFrame:
    """The table in the record type's own types, columns that it lacks as nulls, and LINE counted from `first`."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    absent = [pl.lit(None).alias(name) for name in record.columns if name not in frame.columns]
    return (
        frame.with_columns(absent)
        .select(pl.col(name).cast(dtype) for name, dtype in record.columns.items())
        .with_columns(pl.int_range(first, first + len(frame), dtype=pl.Int64).alias(LINE))
    )


def with_repairs(frame: pl.DataFrame, looked_at: Rows, ignored: Collection[str]) -> Rows:
    """`frame`, where rows that had a null out of place are replaced by what a careful look at them gave."""
    lines = [*looked_at.frame[LINE], *(rejected.line for rejected in looked_at.rejected)]
    if not lines:
        return Rows(frame, ignored=frozenset(ignored))
    others = frame.filter(~pl.col(LINE).is_in(lines))
    joined = pl.concat([others, looked_at.frame]).sort(LINE)
    # a file that is wholly of another form (instruction, input, target) has these fields read, not ignored
    return Rows(joined, looked_at.rejected, looked_at.ignored.union(ignored if len(others) else ()))


def complete(record: RecordType) -> pl.Expr:
    """Whether a row has a null only where its record type allows one, and numbers that are finite."""
    checks = [_whole(pl.col(name), dtype, name, record) for name, dtype in record.columns.items()]
    return pl.all_horizontal(checks).alias("complete")


def _whole(value: pl.Expr, dtype: Any, path: str, record: RecordType) -> pl.Expr:
    inside: list[pl.Expr] = [value.is_not_null()]
    if isinstance(dtype, pl.Struct):
        for part in dtype.fields:
            inside.append(_whole(value.struct.field(part.name), part.dtype, f"{path}.{part.name}", record))
    elif isinstance(dtype, pl.List):
        items = value.list.eval(_whole(pl.element(), dtype.inner, path, record))
        inside.append(items.list.all())
    elif dtype == pl.Float64:
        inside.append(value.is_finite())
    whole = pl.all_horizontal(inside).fill_null(value=False)
    return value.is_null() | whole if record.nullable(path) else whole


def frame_of(rows: list[dict[str, Any]], numbers: list[int], record: RecordType) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict(record.columns), strict=True).with_columns(
        pl.Series(LINE, numbers, dtype=pl.Int64)
    )
