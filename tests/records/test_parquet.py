"""Parquet of every kind: what nobody reads changes no row, and what cannot be read is one line or one row."""

from __future__ import annotations

import decimal
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.domains.returns import domain
from twinloop.records.reading import original_lines, read_files, read_rows
from twinloop.records.rows import Rows
from twinloop.records.validation import check_rows

RECORD_TYPES = domain.record_types()
CORPUS = RECORD_TYPES["corpus"]

ODD_COLUMNS: dict[str, pa.Array] = {
    "NaN and infinity": pa.array([float("nan"), float("inf"), None]),
    "beyond int64": pa.array([2**64 - 1] * 3, pa.uint64()),
    "text that is not UTF-8": pa.array([b"\xff"] * 3, pa.binary()).view(pa.string()),
    "a date that Python has not": pa.array([2**31 - 1] * 3, pa.date32()),
    "a time beyond the day": pa.array([5 * 86400 * 10**9] * 3, pa.time64("ns")),
    "76 digits": pa.array([decimal.Decimal(1)] * 3, pa.decimal256(76, 0)),
    "a map": pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    "50 levels": pa.array([json.loads("[" * 50 + "]" * 50)] * 3),
}


def read_parquet(path: Path, name: str, table: pa.Table) -> Rows:
    pyarrow.parquet.write_table(table, path)
    return read_rows(path, RECORD_TYPES[name])


@pytest.mark.parametrize("kind", ODD_COLUMNS)
def test_a_column_that_nobody_reads_changes_no_row_of_parquet(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    read = pa.table({"text": ["a", None, "b"]})
    expected = read_parquet(path, "corpus", read)
    rows = read_parquet(path, "corpus", read.append_column("x", ODD_COLUMNS[kind]))
    assert rows.frame.equals(expected.frame)
    assert rows.rejected == expected.rejected
    assert rows.ignored == {"x"}
    _, source = read_files(tmp_path, [path], CORPUS)
    assert original_lines(source, {1, 3}, CORPUS) == {1: b'{"text": "a"}', 3: b'{"text": "b"}'}


def test_columns_of_one_name_matter_only_where_they_are_read(tmp_path: Path) -> None:
    path, texts = tmp_path / "corpus.parquet", pa.array(["a", "b"])
    unread = pa.Table.from_arrays([texts] * 3, names=["text", "x", "x"])
    assert read_parquet(path, "corpus", unread).ignored == {"x"}
    with pytest.raises(UserError, match=r"corpus\.parquet: .*two columns are named text"):
        read_parquet(path, "corpus", pa.Table.from_arrays([texts] * 2, names=["text", "text"]))


def test_a_number_of_parquet_beyond_int64_is_quarantined_by_its_row(tmp_path: Path) -> None:
    versions = pa.array([1, 2**64 - 1, 3], pa.uint64())
    table = pa.table({"document_id": ["P-1", "P-2", "P-3"], "version": versions, "text": ["a", "b", "c"]})
    rows = read_parquet(tmp_path / "documents.parquet", "documents", table)
    assert rows.frame["version"].to_list() == [1, 3]
    assert [(rejected.line, rejected.reason) for rejected in rows.rejected] == [(2, "version is too large a number")]


# --- columns that are read, of a type that is not wanted

TYPES: dict[str, tuple[pa.Array, str]] = {
    "nothing but null": (pa.nulls(2), "text is missing"),
    "decimals": (pa.array([decimal.Decimal("1.5")] * 2), "text is Decimal, not text"),
    "dates that Python has not": (pa.array([2**31 - 1] * 2, pa.date32()), "text is date32[day] with a value"),
    "times of no zone": (
        pa.array([1, 2], pa.timestamp("us", "Nowhere/Land")),
        "text is timestamp[us, tz=Nowhere/Land]",
    ),
    "half floats": (pa.array(np.array([1, 2], np.float16)), "text is number, not text"),
    "bytes": (pa.array([b"\xff", b"a"]), "text is bytes, not text"),
    "a map": (pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())), "text is list, not text"),
    "objects": (pa.array([{"a": 1}] * 2), "text is object, not text"),
    "objects with a field twice": (
        pa.StructArray.from_arrays([pa.array(["a", "b"])] * 2, names=["x", "x"]),
        "text is struct<x: string, x: string> with a value",
    ),
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_column_of_a_type_that_cannot_be_used_is_quarantined_row_by_row(kind: str, tmp_path: Path) -> None:
    column, reason = TYPES[kind]
    rows = read_parquet(tmp_path / "corpus.parquet", "corpus", pa.table({"text": column}))
    assert rows.frame.is_empty()
    assert [(one.line, one.reason.startswith(reason)) for one in rows.rejected] == [(1, True), (2, True)], rows.rejected


def test_texts_of_every_layout_are_texts(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(["a", "b"], kind)})
        assert read_parquet(tmp_path / "corpus.parquet", "corpus", table).frame["text"].to_list() == ["a", "b"]


def test_metadata_that_polars_cannot_read_matters_to_nobody(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"]}).replace_schema_metadata({b"made by \xff": b"\xff"})
    assert len(read_parquet(tmp_path / "corpus.parquet", "corpus", table).frame) == 1


# --- broken files


def broken(rng: random.Random, content: bytes) -> bytes:
    """Cut short, or with a few bytes changed; most of them in the footer, which says what all others are."""
    data = bytearray(content[: rng.randrange(1, len(content))] if rng.random() < 0.3 else content)
    for _ in range(rng.randint(0, 6)):
        back = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 1500))
        data[len(data) - 1 - back] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("name", ["corpus", "chat"])
def test_a_broken_file_is_read_or_named_in_one_line(name: str, compression: str, tmp_path: Path) -> None:
    said: dict[str, Any] = {"corpus": {"text": pa.array([f"text {n % 7} é" for n in range(60)]).dictionary_encode()}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    said["chat"] = {"messages": [turns] * 60, "source": list(range(60))}
    path = tmp_path / f"{name}.parquet"
    pyarrow.parquet.write_table(pa.table(said[name]), path, compression=compression, row_group_size=20)
    content, rng, refused = path.read_bytes(), random.Random(f"{name} {compression}"), []
    for _ in range(60):
        path.write_bytes(broken(rng, content))
        try:
            rows, source = check_rows(tmp_path, [path], Domain().record_types()[name])
            assert len(rows.frame) + len(rows.rejected) == sum(source.rows)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(line.startswith(f"{path}: not a readable Parquet file (") and "\n" not in line for line in refused)
