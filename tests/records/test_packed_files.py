"""Files as they come: compressed, in UTF-16, with a byte order mark. The rows are those of the plain file."""

from __future__ import annotations

import codecs
import gzip
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.records import jsonl
from twinloop.records.reading import original_lines, read_files, read_rows

CORPUS = Domain().record_types()["corpus"]
TEXTS = [f"Seite {number}: äöü 😀 {'word ' * (number % 9)}" for number in range(3000)]
LINES = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
PLAIN = "".join(f"{line}\n" for line in LINES)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


SKIPPED_FRAME = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
HALF = len(PLAIN.encode()) // 2

FILES: dict[str, bytes] = {
    "gzip": gzip.compress(PLAIN.encode()),
    "gzip of two members": gzip.compress(PLAIN.encode()[:HALF]) + gzip.compress(PLAIN.encode()[HALF:]),
    "zstd": zstd(PLAIN.encode()),
    "zstd of two frames": zstd(PLAIN.encode()[:HALF]) + zstd(PLAIN.encode()[HALF:]),
    "UTF-8 with a mark": PLAIN.encode("utf-8-sig"),
    "UTF-16, as Windows writes it": codecs.BOM_UTF16_LE + PLAIN.replace("\n", "\r\n").encode("utf-16-le"),
    "UTF-16, the other way round": codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    "UTF-16 without a mark": PLAIN.encode("utf-16-le"),
    "UTF-16 without a mark, the other way round": PLAIN.encode("utf-16-be"),
    "UTF-32": PLAIN.encode("utf-32"),
    "UTF-16 in gzip": gzip.compress(PLAIN.encode("utf-16")),
    "without a last newline": PLAIN.encode("utf-16")[:-2],
}


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst"])
@pytest.mark.parametrize("kind", FILES)
def test_the_rows_are_those_of_the_plain_file(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 10_000)
    path = tmp_path / name
    path.write_bytes(FILES[kind])
    rows, source = read_files(tmp_path, [path], CORPUS)
    assert rows.frame["text"].to_list() == TEXTS
    assert not rows.rejected
    kept = original_lines(source, {2, 2999}, CORPUS)
    assert {number: line.decode() for number, line in kept.items()} == {2: LINES[1], 2999: LINES[2998]}


def test_half_of_a_surrogate_pair_in_utf_16_costs_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(('\ufeff{"text": "a"}\n{"text": "\ud800"}\n{"text": "b"}\n').encode("utf-16-le", "surrogatepass"))
    rows = read_rows(path, CORPUS)
    assert rows.frame["text"].to_list() == ["a", "b"]
    assert [(one.line, one.reason) for one in rows.rejected] == [(2, "not UTF-8: byte 0xed at column 11")]


BROKEN: dict[str, tuple[bytes, str]] = {
    "gzip that was cut": (FILES["gzip"][:-20], "cannot be decompressed ("),
    "gzip with another byte": (FILES["gzip"][:500] + b"\xff\xff\xff" + FILES["gzip"][503:], "cannot be decompressed ("),
    "gzip with something behind": (FILES["gzip"] + b"rest", "cannot be decompressed ("),
    "zstd that was cut": (FILES["zstd"][:-20], "cannot be decompressed ("),
    "UTF-16 that was cut": (FILES["UTF-16, as Windows writes it"][:-1], "UTF-16"),
    "UTF-32 with what is no character": (codecs.BOM_UTF32_LE + b"{\0\0\0\xff\xff\xff\xff", "UTF-32"),
    "zip": (b"PK\x03\x04" + bytes(50), "is a zip archive; unpack it"),
    "bzip2": (b"BZh91AY", "is compressed with bzip2; unpack it"),
    "xz": (b"\xfd7zXZ\0", "is compressed with xz; unpack it"),
    "Parquet": (b"PAR1" + bytes(50), "is Parquet; give it the ending .parquet"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_unpacked_is_named_in_one_line(kind: str, tmp_path: Path) -> None:
    content, message = BROKEN[kind]
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_rows(path, CORPUS)
    assert str(raised.value).startswith(f"{path}: {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("pack", [gzip.compress, zstd, lambda content: codecs.BOM_UTF16_LE + content])
def test_random_bytes_are_no_crash(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path, rng = tmp_path / "corpus.jsonl", random.Random(1)
    for _ in range(100):
        content = bytearray(pack(PLAIN.encode()[:2000]))
        for _ in range(rng.randint(1, 5)):
            content[rng.randrange(4, len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.randrange(4, len(content))])
        with suppress(UserError):
            read_rows(path, CORPUS)
