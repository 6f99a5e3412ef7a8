"""Reads JSONL and Parquet into typed frames and loses no row: each is in the frame, or rejected with a reason.

Two ways through JSONL give the same result. pyarrow reads a block of well-formed lines at more than 200 MB/s. Where it
refuses, the block is halved until the lines at fault are alone; those are read one by one, by `json`, which is slow and
can say what is wrong. Common forms that are not ours (instruction, input and target; a prompt that is one string) take
the slow way and come out as chat messages.

What a row may hold in fields that nobody reads is one rule, `_parse`: pyarrow accepts a block by itself only where every
field is read. In other blocks it skips the unread fields, and each line is parsed by `_parse` too. No type is inferred
from what nobody reads.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from domains.returns.schemas import RecordType
from models.errors import UserError

FORMATS = (".jsonl", ".parquet")
BLOCK_BYTES = 16 << 20
CAREFUL_LINES = 64
"""A block of so few lines that was refused is read line by line."""

MAX_DEPTH = 128
"""Levels of objects and lists in a row, the row itself included. `json` stops at about 1,000, less what its caller uses
of the stack."""

LINE = "line"
INT64 = range(-(2**63), 2**63)
TYPE_NAMES = {str: "text", bool: "boolean", int: "integer", float: "number", list: "list", dict: "object"}


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used. `line` counts from 1 (rows, in a Parquet file)."""

    line: int
    reason: str
    row: str
    """The line as it stands in the file; bytes that are not UTF-8 are written as \\xNN."""
    base64: str | None = None
    """The line's bytes, where `row` cannot hold them."""


@dataclass
class Rows:
    """A file that was read. `frame` has the record type's columns and LINE; every row is in it or in `rejected`."""

    frame: pl.DataFrame
    rejected: list[Rejected] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    """Dotted names of fields that the record type does not know; they are left out of the frame."""


def data_files(folder: Path, name: str) -> list[Path]:
    """The files of one record type in `folder`: there should be one, in either format."""
    return [path for suffix in FORMATS if (path := folder / f"{name}{suffix}").is_file()]


def read_rows(path: Path, record: RecordType) -> Rows:
    """Read a .jsonl or .parquet file. Raises UserError when it is neither, or cannot be opened."""
    try:
        parts = list(_parquet(path, record) if path.suffix == ".parquet" else _jsonl(path, record))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    frame = pl.concat([part.frame for part in parts]) if parts else _frame([], [], record)
    return Rows(
        frame,
        [rejected for part in parts for rejected in part.rejected],
        set().union(*(part.ignored for part in parts)) if parts else set(),
    )


def original_lines(path: Path, lines: set[int], record: RecordType) -> dict[int, bytes]:
    """The given lines as they stand in a file; a Parquet row as the JSON of its columns."""
    if path.suffix == ".parquet":
        index = sorted(lines)
        rows = pl.read_parquet(path)[[line - 1 for line in index]].iter_rows(named=True)
        return {line: _as_json(row).encode() for line, row in zip(index, rows, strict=True)}
    with path.open("rb") as file:
        return {number: line.rstrip(b"\r\n") for number, line in enumerate(file, 1) if number in lines}


def rejected_line(number: int, reason: str, line: bytes) -> Rejected:
    try:
        return Rejected(number, reason, line.decode())
    except UnicodeDecodeError:
        return Rejected(number, reason, line.decode(errors="backslashreplace"), base64.b64encode(line).decode())


# --- JSONL


def _jsonl(path: Path, record: RecordType) -> Iterator[Rows]:
    first = 1
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark, as Windows writes it
            file.seek(0)
        while block := file.read(BLOCK_BYTES):
            block += file.readline()
            lines = block.count(b"\n") + (not block.endswith(b"\n"))
            yield from _block(block, first, lines, record)
            first += lines


def _block(block: bytes, first: int, lines: int, record: RecordType) -> Iterator[Rows]:
    """`lines` whole lines, of which the first has the number `first`."""
    fast = _fast(block, first, lines, record)
    if fast is not None:
        yield fast
    elif lines <= CAREFUL_LINES:
        yield _careful(list(enumerate(block.removesuffix(b"\n").split(b"\n"), first)), record)
    else:
        cut = block.rfind(b"\n", 0, len(block) // 2) + 1 or block.index(b"\n") + 1
        half = block.count(b"\n", 0, cut)
        yield from _block(block[:cut], first, half, record)
        yield from _block(block[cut:], first + half, lines - half, record)


def _fast(block: bytes, first: int, lines: int, record: RecordType) -> Rows | None:
    """The block by pyarrow, or None where a line is not one complete, well-typed object."""
    # pyarrow takes several objects on a line, and passes over blank ones: every line must be {...}
    if not (block.startswith(b"{") and block.rstrip(b"\n").endswith(b"}") and block.count(b"}\n{") == lines - 1):
        return None
    try:
        block.decode()  # pyarrow lets bad UTF-8 through
    except UnicodeDecodeError:
        return None
    table = _arrow_table(block, record, "error")
    all_read = table is not None
    if table is None:
        table = _arrow_table(block, record, "ignore")
    if table is None or table.num_rows != lines:
        return None
    frame = _numbered(table, first, record)
    gaps = set(frame.filter(~complete(record))[LINE])
    if all_read and not gaps:
        return Rows(frame)
    text = list(enumerate(block.removesuffix(b"\n").split(b"\n"), first))
    ignored: set[str] = set()
    if not all_read:
        known = _known(record)
        try:
            for number, line in text:
                if number not in gaps:
                    ignored.update(_unread(_parse(line), known))
        except _UnusableError:
            return None
    return _mended(frame, _careful([one for one in text if one[0] in gaps], record), ignored)


def _arrow_table(block: bytes, record: RecordType, unread: Literal["error", "ignore"]) -> pa.Table | None:
    """The record type's columns, or None where pyarrow refuses the block."""
    try:
        return pyarrow.json.read_json(
            io.BytesIO(block),
            read_options=pyarrow.json.ReadOptions(block_size=max(1 << 20, len(block) // 8)),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=_arrow_schema(record), unexpected_field_behavior=unread
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _numbered(table: pa.Table, first: int, record: RecordType) -> pl.DataFrame:
    """The table in the record type's own types, columns that it lacks as nulls, and LINE counted from `first`."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    absent = [pl.lit(None).alias(name) for name in record.columns if name not in frame.columns]
    return (
        frame.with_columns(absent)
        .select(pl.col(name).cast(dtype) for name, dtype in record.columns.items())
        .with_columns(pl.int_range(first, first + len(frame), dtype=pl.Int64).alias(LINE))
    )


def _mended(frame: pl.DataFrame, looked_at: Rows, ignored: set[str]) -> Rows:
    """`frame`, where rows that had a null out of place are replaced by what a careful look at them gave."""
    lines = [*looked_at.frame[LINE], *(rejected.line for rejected in looked_at.rejected)]
    if not lines:
        return Rows(frame, [], ignored)
    others = frame.filter(~pl.col(LINE).is_in(lines))
    joined = pl.concat([others, looked_at.frame]).sort(LINE)
    # a file that is wholly of another form (instruction, input, target) has these fields read, not ignored
    return Rows(joined, looked_at.rejected, looked_at.ignored | (ignored if len(others) else set()))


def _careful(lines: list[tuple[int, bytes]], record: RecordType) -> Rows:
    """Numbered lines, parsed and looked at one by one."""
    return _examined(((number, line.rstrip(b"\r"), partial(_parse, line)) for number, line in lines), record)


def _examined(rows: Iterable[tuple[int, bytes, Callable[[], Any]]], record: RecordType) -> Rows:
    """Rows looked at one by one: (line, the row as it stands, what gives its value)."""
    good: list[dict[str, Any]] = []
    numbers: list[int] = []
    rejected: list[Rejected] = []
    ignored: set[str] = set()
    known = _known(record)
    for number, original, value in rows:
        try:
            row = _from_other_forms(value(), record)
            ignored.update(_unread(row, known))
            good.append(_typed(row, record))
            numbers.append(number)
        except _UnusableError as problem:
            rejected.append(rejected_line(number, str(problem), original))
    return Rows(_frame(good, numbers, record), rejected, ignored)


class _UnusableError(Exception):
    """Why a row cannot be used."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise _UnusableError("broken JSON: a key stands twice in one object")
    return row


def _no_constant(name: str) -> Any:
    raise _UnusableError(f"broken JSON: {name} is no JSON value")


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts; `json` gives infinity for 1e999 too
        return math.inf


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def _parse(line: bytes) -> Any:
    """A line's JSON value, infinity where a number is too large. Raises _UnusableError where it has none."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _UnusableError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None
    if not text.strip():
        raise _UnusableError("blank line")
    if "\0" in text:
        raise _UnusableError(f"holds a NUL byte at column {text.index(chr(0)) + 1}")
    if _too_deep(line):  # before `json`, which recurses
        raise _UnusableError(f"broken JSON: nested too deep (more than {MAX_DEPTH} levels)")
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise _UnusableError(f"broken JSON: {error.msg.lower()} at column {error.colno}") from None


def _too_deep(line: bytes) -> bool:
    if line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(line):
        start = line[token.start()]
        depth += (start in b"[{") - (start in b"]}")
        if depth > MAX_DEPTH:
            return True
    return False


def _from_other_forms(row: Any, record: RecordType) -> Any:
    """Chat messages out of `instruction`, `input`, `target` (or `output`), and out of a prompt that is one string."""
    if not isinstance(row, dict):
        return row
    if "messages" in record.columns and "messages" not in row and "instruction" in row:
        given = {name: row[name] for name in ("instruction", "input", "target", "output") if name in row}
        text = {name: value if isinstance(value, str) else _as_text(value, name) for name, value in given.items()}
        question = "\n".join(text[name] for name in ("instruction", "input") if text.get(name))
        answer = text.get("target", text.get("output"))
        if answer is not None:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return {name: value for name, value in row.items() if name not in given} | {"messages": turns}
    if "prompt" in record.columns and isinstance(row.get("prompt"), str):
        return row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
    return row


def _as_text(value: Any, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        raise _UnusableError(f"{name} holds too large a number") from None


def _typed(row: Any, record: RecordType) -> dict[str, Any]:
    """The row with just the record type's fields. Raises _UnusableError for one that is missing or of another type."""
    if not isinstance(row, dict):
        raise _UnusableError(f"not a JSON object but {_type_name(row)}")
    return {name: _value(row.get(name), dtype, name, record) for name, dtype in record.columns.items()}


def _value(value: Any, dtype: Any, path: str, record: RecordType) -> Any:
    if value is None:
        if record.nullable(path):
            return None
        raise _UnusableError(f"{path} is missing")
    if isinstance(dtype, pl.Struct) and isinstance(value, dict):
        parts = {part.name: part.dtype for part in dtype.fields}
        return {name: _value(value.get(name), part, f"{path}.{name}", record) for name, part in parts.items()}
    if isinstance(dtype, pl.List) and isinstance(value, list):
        return [_value(item, dtype.inner, path, record) for item in value]
    if value in (math.inf, -math.inf):
        raise _UnusableError(f"{path} is too large a number")
    wanted = _python_type(dtype)
    if type(value) is not wanted:
        raise _UnusableError(f"{path} is {_type_name(value)}, not {TYPE_NAMES[wanted]}")
    if isinstance(value, int) and value not in INT64:
        raise _UnusableError(f"{path} is too large a number")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _UnusableError(f"{path} holds half of a surrogate pair") from None
    return value


def _type_name(value: Any) -> str:
    return TYPE_NAMES.get(type(value), "null" if value is None else type(value).__name__)


def _python_type(dtype: Any) -> type:
    if isinstance(dtype, pl.Struct):
        return dict
    if isinstance(dtype, pl.List):
        return list
    return str if dtype == pl.String else bool if dtype == pl.Boolean else int


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# --- Parquet


def _parquet(path: Path, record: RecordType) -> Iterator[Rows]:
    """One frame for each row group, so that a large file is never whole in memory twice."""
    first = 1
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            table.validate(full=True)
            rows = _table(table, first, record)
            first += table.num_rows
            yield rows
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:200]})") from None


def _table(table: pa.Table, first: int, record: RecordType) -> Rows:
    numbers = range(first, first + table.num_rows)
    fits = all(
        _fits(table.schema.field(name).type, dtype) if name in table.schema.names else record.nullable(name)
        for name, dtype in record.columns.items()
    )
    if fits:
        known = [name for name in record.columns if name in table.schema.names]
        ignored = set(table.schema.names) - set(known)
        for name in known:
            ignored |= _unknown(table.schema.field(name).type, record.columns[name], name)
        frame = _numbered(table.select(known), first, record)
        gaps = frame.filter(~complete(record))[LINE].to_list()
        if not gaps:
            return Rows(frame, [], ignored)
        return _mended(frame, _examined(_parquet_rows(table, gaps, first), record), ignored)
    return _examined(_parquet_rows(table, numbers, first), record)


def _parquet_rows(
    table: pa.Table, numbers: Iterable[int], first: int
) -> Iterator[tuple[int, bytes, Callable[[], Any]]]:
    for number in numbers:
        [row] = table.slice(number - first, 1).to_pylist()
        yield number, _as_json(row).encode(errors="replace"), partial(dict, row)


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
    kind = _python_type(want)
    if kind is str:
        return types.is_string(have) or types.is_large_string(have) or types.is_string_view(have)
    return types.is_boolean(have) if kind is bool else types.is_integer(have)


# --- schemas


def complete(record: RecordType) -> pl.Expr:
    """Whether a row has a null only where its record type allows one."""
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
    whole = pl.all_horizontal(inside).fill_null(value=False)
    return value.is_null() | whole if record.nullable(path) else whole


def _known(record: RecordType) -> dict[str, Any]:
    """The names of the record type's fields, each with those inside it: {"messages": {"role": {}, "content": {}}}."""
    return _inside(pl.Struct(dict(record.columns)))


def _inside(dtype: Any) -> dict[str, Any]:
    if isinstance(dtype, pl.List):
        return _inside(dtype.inner)
    return {part.name: _inside(part.dtype) for part in dtype.fields} if isinstance(dtype, pl.Struct) else {}


def _unread(value: Any, known: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted names of the fields in a parsed row that are not known."""
    if isinstance(value, list):
        for item in value:
            yield from _unread(item, known, path)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in known:
                yield path + name
            elif known[name]:
                yield from _unread(inner, known[name], f"{path}{name}.")


def _arrow_schema(record: RecordType) -> pa.Schema:
    return pa.schema([(name, _arrow(dtype)) for name, dtype in record.columns.items()])


def _arrow(dtype: Any) -> pa.DataType:
    if isinstance(dtype, pl.Struct):
        return pa.struct([(part.name, _arrow(part.dtype)) for part in dtype.fields])
    if isinstance(dtype, pl.List):
        return pa.list_(_arrow(dtype.inner))
    return {str: pa.string(), int: pa.int64(), bool: pa.bool_()}[_python_type(dtype)]


def _unknown(have: pa.DataType, want: Any, path: str) -> set[str]:
    """Dotted names of the fields inside a column that the wanted type does not have."""
    if pa.types.is_dictionary(have):
        return set()
    if isinstance(want, pl.Struct):
        wanted: Mapping[str, Any] = {part.name: part.dtype for part in want.fields}
        fields = {have.field(i).name: have.field(i).type for i in range(have.num_fields)}
        unknown = {f"{path}.{name}" for name in fields.keys() - wanted.keys()}
        return unknown.union(*(_unknown(fields[n], wanted[n], f"{path}.{n}") for n in fields.keys() & wanted.keys()))
    if isinstance(want, pl.List):
        return _unknown(have.value_type, want.inner, path)
    return set()


def _frame(rows: list[dict[str, Any]], numbers: list[int], record: RecordType) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict(record.columns), strict=True).with_columns(
        pl.Series(LINE, numbers, dtype=pl.Int64)
    )
