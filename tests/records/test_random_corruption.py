"""Rows corrupted at random: none is lost, and both ways of reading agree."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest
from validating import RECORD_TYPES, lines_of

from twinloop.common.errors import UserError
from twinloop.records import jsonl
from twinloop.records.reading import read_rows
from twinloop.records.rows import LINE
from twinloop.records.validation import check_rows

SPECIAL = [b'"', b"\\", b"{", b"}", b",", b"\n", b"\0", b"\xff", b"\r", b"[", b"null"]


def corrupted(rng: random.Random, line: bytes) -> bytes:
    """The line with a few bytes inserted, replaced or taken away; a newline may be among them."""
    data = bytearray(line)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        roll = rng.random()
        some = rng.choice([*SPECIAL, bytes([rng.randrange(256)])])
        if roll < 0.4:
            data[place:place] = some
        elif roll < 0.7:
            data[place : place + rng.randint(1, 8)] = some
        else:
            del data[place : place + rng.randint(1, 20)]
    return bytes(data)


@pytest.mark.parametrize("name", RECORD_TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_random_corruption_loses_no_row_and_both_ways_of_reading_agree(
    name: str, seed: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{seed}/{name}")
    path = data / f"{name}.jsonl"
    rate = rng.choice([0.02, 0.3, 1.0])
    path.write_bytes(
        b"\n".join(corrupted(rng, x) if rng.random() < rate else x for x in lines_of(path)[:150] * 2) + b"\n"
    )
    raw = path.read_bytes()
    total = raw.count(b"\n")
    record = RECORD_TYPES[name]
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", rng.choice([1, 3000, 1 << 24]))
    monkeypatch.setattr(jsonl, "CAREFUL_LINES", rng.choice([1, 7, 64]))
    quick = read_rows(path, record)
    monkeypatch.setattr(jsonl, "_fast", lambda *_: None)
    monkeypatch.setattr(jsonl, "CAREFUL_LINES", 1 << 30)
    slow = read_rows(path, record)
    assert quick.frame.equals(slow.frame)
    assert quick.rejected == slow.rejected
    seen = sorted([*quick.frame[LINE], *(r.line for r in quick.rejected)])
    assert seen == list(range(1, total + 1))
    checked, _ = check_rows(data, [path], record)
    assert len(checked.frame) + len(checked.rejected) == total
    originals = raw.split(b"\n")
    for rejected in checked.rejected:
        kept = base64.b64decode(rejected.base64) if rejected.base64 else rejected.row.encode()
        assert kept.rstrip(b"\r") == originals[rejected.line - 1].rstrip(b"\r")


def test_a_binary_file_is_no_crash(check, data: Path) -> None:
    (data / "corpus.jsonl").write_bytes(random.Random(1).randbytes(200_000))
    with pytest.raises(UserError, match="rows cannot be used"):
        check()
