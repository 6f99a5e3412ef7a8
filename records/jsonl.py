"""JSONL into typed frames, in two ways that give the same result.

pyarrow reads a block of well-formed lines at more than 200 MB/s. Where it refuses, the block is halved until the lines
at fault are alone; those are read one by one, by `common.strict_json`, which is slow and can report what is wrong.

What a row may hold in fields that nobody reads is one rule, `_parse`: pyarrow accepts a block by itself only where
every field is read. In other blocks it skips the unread fields, and each line is parsed by `_parse` too. No type is
inferred from what nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.json

from twinloop.common.strict_json import NotJSONError, parse_json
from twinloop.domains.record_types import RecordType
from twinloop.records.forms import UnusableError
from twinloop.records.opening import open_lines
from twinloop.records.rows import (
    LINE,
    Rows,
    complete,
    examined,
    known_fields,
    numbered,
    python_type,
    unread_fields,
    with_repairs,
)

BLOCK_BYTES = 16 << 20
CAREFUL_LINES = 64
"""A block of so few lines that was refused is read line by line."""


def read_jsonl(path: Path, record: RecordType) -> Iterator[Rows]:
    first = 1
    with open_lines(path) as file:
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
        yield _careful(_numbered_lines(block, first), record)
    else:
        cut = block.rfind(b"\n", 0, len(block) // 2) + 1 or block.index(b"\n") + 1
        half = block.count(b"\n", 0, cut)
        yield from _block(block[:cut], first, half, record)
        yield from _block(block[cut:], first + half, lines - half, record)


def _fast(block: bytes, first: int, lines: int, record: RecordType) -> Rows | None:
    """The block by pyarrow, or None where a line is not one complete, well-typed object."""
    # pyarrow takes several objects on a line, and passes over blank ones: every line must be {...}
    if not (block.startswith(b"{") and block.endswith((b"}", b"}\n")) and block.count(b"}\n{") == lines - 1):
        return None
    if not block.isascii():
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
    frame = numbered(table, first, record)
    gaps = set(frame.filter(~complete(record))[LINE])
    if all_read and not gaps:
        return Rows(frame)
    text = _numbered_lines(block, first)
    ignored: set[str] = set()
    if not all_read:
        known = known_fields(record)
        try:
            for number, line in text:
                if number not in gaps:
                    ignored.update(unread_fields(_parse(line), known))
        except UnusableError:
            return None
    return with_repairs(frame, _careful([one for one in text if one[0] in gaps], record), ignored)


def _arrow_table(block: bytes, record: RecordType, unread: Literal["error", "ignore"]) -> pa.Table | None:
    """The record type's columns, or None where pyarrow refuses the block."""
    try:
        return pyarrow.json.read_json(
            pa.BufferReader(block),
            read_options=pyarrow.json.ReadOptions(block_size=max(1 << 20, len(block) // 8)),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=_arrow_schema(record), unexpected_field_behavior=unread
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _numbered_lines(block: bytes, first: int) -> list[tuple[int, bytes]]:
    return list(enumerate(block.removesuffix(b"\n").split(b"\n"), first))


def _careful(lines: list[tuple[int, bytes]], record: RecordType) -> Rows:
    """Numbered lines, parsed and looked at one by one."""
    return examined(((number, line.rstrip(b"\r"), partial(_parse, line)) for number, line in lines), record)


def _parse(line: bytes) -> Any:
    """A line's JSON value, infinity where a number is too large. Raises UnusableError where it has none."""
    try:
        text = line.decode("utf-8-sig")  # with a byte order mark, as Windows writes it at the start of a file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UnusableError(f"not UTF-8: byte 0x{byte:02x} at column {error.start + 1}") from None
    if not text.strip():
        raise UnusableError("blank line")
    if "\0" in text:
        raise UnusableError(f"holds a NUL byte at column {text.index(chr(0)) + 1}")
    try:
        return parse_json(text)
    except NotJSONError as error:
        raise UnusableError(f"broken JSON: {error}") from None


def _arrow_schema(record: RecordType) -> pa.Schema:
    return pa.schema([(name, _arrow(dtype)) for name, dtype in record.columns.items()])


def _arrow(dtype: Any) -> pa.DataType:
    if isinstance(dtype, pl.Struct):
        return pa.struct([(part.name, _arrow(part.dtype)) for part in dtype.fields])
    if isinstance(dtype, pl.List):
        return pa.list_(_arrow(dtype.inner))
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[python_type(dtype)]
