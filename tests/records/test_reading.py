"""One result for a row, whatever is around it: the two ways through JSONL agree, and unread fields cost nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from twinloop.common.strict_json import MAX_DEPTH
from twinloop.domains.returns import domain
from twinloop.records import jsonl
from twinloop.records.reading import read_rows
from twinloop.records.rows import LINE, Rows

RECORD_TYPES = domain.record_types()

CLEAN = {
    "corpus": b'{"text": "clean"}',
    "chat": b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
    "documents": b'{"document_id": "P-1", "version": 1, "text": "clean"}',
    "preferences": b'{"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}',
}
BROKEN = b'{"text": "broken'
KEPT = ""
TOO_DEEP = f"broken JSON: nested too deep (more than {MAX_DEPTH} levels)"
KEY_TWICE = "broken JSON: a key appears twice in one object"
SURROGATE = "holds half of a surrogate pair"


def corpus(unread: bytes) -> tuple[str, bytes]:
    """A row of the corpus with a field that nobody reads."""
    return "corpus", b'{"text": "c", "x": ' + unread + b"}"


def chat(unread: bytes) -> tuple[str, bytes]:
    """A row with a field that nobody reads inside of one that is read."""
    return "chat", CLEAN["chat"].replace(b'"role": "user"', b'"role": "user", "x": ' + unread)


def version(number: bytes) -> tuple[str, bytes]:
    """A row in which a number is read."""
    return "documents", CLEAN["documents"].replace(b'"version": 1', b'"version": ' + number)


def text(value: bytes) -> tuple[str, bytes]:
    return "corpus", b'{"text": ' + value + b"}"


def lists(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def objects(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


ROWS: dict[str, tuple[tuple[str, bytes], str]] = {
    # depth: the row is a level too, and so are the list of messages and the message
    "lists as deep as allowed": (corpus(lists(MAX_DEPTH - 1)), KEPT),
    "lists too deep": (corpus(lists(MAX_DEPTH)), TOO_DEEP),
    "objects as deep as allowed": (corpus(objects(MAX_DEPTH - 1)), KEPT),
    "objects too deep": (corpus(objects(MAX_DEPTH)), TOO_DEEP),
    "lists as deep as allowed in a message": (chat(lists(MAX_DEPTH - 3)), KEPT),
    "lists too deep in a message": (chat(lists(MAX_DEPTH - 2)), TOO_DEEP),
    "a read field too deep": (text(lists(MAX_DEPTH)), TOO_DEEP),
    "20,000 levels": (corpus(lists(20_000)), TOO_DEEP),
    "100,000 levels of objects": (corpus(objects(100_000)), TOO_DEEP),
    "too deep and never closed": (corpus(b"[" * 500), TOO_DEEP),
    "many lists, none in another": (corpus(b"[" + b"[]," * 500 + b"[]]"), KEPT),
    "brackets in a string": (corpus(b'"' + b"[" * 500 + b'"'), KEPT),
    "brackets in a string with quotes": (corpus(b'"\\"' + b"[" * 500 + b'\\\\"'), KEPT),
    "brackets in a text": (text(b'"' + b"{[" * 500 + b'"'), KEPT),
    "brackets in a key": (("corpus", b'{"text": "c", "' + b"[" * 500 + b'": 1}'), KEPT),
    # numbers
    **{
        f"{where} {value}": (place(value.encode()), f"broken JSON: {value} is no JSON value")
        for value in ("NaN", "Infinity", "-Infinity")
        for where, place in {"unread": corpus, "unread in a message": chat, "read": version}.items()
    },
    "NaN in an unread list": (corpus(b"[1, NaN]"), "broken JSON: NaN is no JSON value"),
    "NaN in a string": (corpus(b'"NaN, Infinity"'), KEPT),
    "-NaN": (corpus(b"-NaN"), "broken JSON: expecting value at column 20"),
    "Inf": (corpus(b"Inf"), "broken JSON: expecting value at column 20"),
    "5,000 digits unread": (corpus(b"1" * 5000), KEPT),
    "5,000 digits unread in a message": (chat(b"-" + b"1" * 5000), KEPT),
    "5,000 digits read": (version(b"1" * 5000), "version is too large a number"),
    "5,000 digits in an input": (
        ("chat", b'{"instruction": "i", "target": "t", "input": {"n": ' + b"1" * 5000 + b"}}"),
        "a number in input is too large, or NaN",
    ),
    "1e999 unread": (corpus(b"1e999"), KEPT),
    "1e999 read": (version(b"1e999"), "version is too large a number"),
    "1e999 in an input": (
        ("chat", b'{"instruction": "i", "target": "t", "input": {"n": 1e999}}'),
        "a number in input is too large, or NaN",
    ),
    "beyond int64 unread": (corpus(b"9223372036854775808"), KEPT),
    "beyond int64 read": (version(b"9223372036854775808"), "version is too large a number"),
    "the largest int64": (version(b"9223372036854775807"), KEPT),
    "a fraction read": (version(b"1.0"), "version is number, not integer"),
    "an exponent read": (version(b"1e2"), "version is number, not integer"),
    "minus zero unread": (corpus(b"-0"), KEPT),
    "minus zero read": (version(b"-0"), KEPT),
    "a leading zero": (corpus(b"01"), "broken JSON: expecting ',' delimiter at column 21"),
    "a leading plus": (corpus(b"+1"), "broken JSON: expecting value at column 20"),
    "no digit after the point": (corpus(b"1."), "broken JSON: expecting ',' delimiter at column 21"),
    # keys
    "a key twice": (("corpus", b'{"text": "a", "text": "a"}'), KEY_TWICE),
    "an escaped key twice": (
        ("corpus", b'{"text": "a", "te\\u0078t": "a"}'),
        KEY_TWICE,
    ),
    "an unread key twice": (
        ("corpus", b'{"text": "a", "x": 1, "x": 1}'),
        KEY_TWICE,
    ),
    "a key twice in an unread object": (
        corpus(b'[{"a": 1, "a": 2}]'),
        KEY_TWICE,
    ),
    "a key twice in a message": (chat(b'1, "x": 1'), KEY_TWICE),
    "an escaped key": (("corpus", b'{"te\\u0078t": "a"}'), KEPT),
    "an empty key": (("corpus", b'{"text": "a", "": 1}'), KEPT),
    "a read key in an unread object": (corpus(b'{"text": 5}'), KEPT),
    "a key with half of a surrogate pair": (("corpus", b'{"text": "a", "\\ud800": 1}'), KEPT),
    # strings
    "half of a surrogate pair unread": (corpus(b'"\\ud800"'), KEPT),
    "half of a surrogate pair read": (text(b'"\\ud800"'), f"text {SURROGATE}"),
    "a surrogate pair": (text(b'"\\ud83d\\ude00"'), KEPT),
    "a bad escape unread": (corpus(b'"\\q"'), "broken JSON: invalid \\escape at column 21"),
    "a short escape unread": (corpus(b'"\\u12"'), "broken JSON: invalid \\uxxxx escape at column 22"),
    "invalid UTF-8 unread": (corpus(b'"caf\xe9"'), "not UTF-8: byte 0xe9 at column 24"),
    "a control character unread": (corpus(b'"a\tb"'), "broken JSON: invalid control character at at column 22"),
    "a NUL byte unread": (corpus(b'"a\0b"'), "holds a NUL byte at column 22"),
    "a delete character": (text(b'"a\x7fb"'), KEPT),
    "a byte order mark, as where files were joined": (("corpus", b'\xef\xbb\xbf{"text": "a"}'), KEPT),
    "two byte order marks": (
        ("corpus", b'\xef\xbb\xbf\xef\xbb\xbf{"text": "a"}'),
        "broken JSON: expecting value at column 1",
    ),
    # the line
    "a trailing comma": (corpus(b"1,"), "broken JSON: expecting property name enclosed in double quotes at column 22"),
    "a trailing comma in an unread list": (corpus(b"[1,]"), "broken JSON: expecting value at column 23"),
    "a comment": (corpus(b"1 /* one */"), "broken JSON: expecting ',' delimiter at column 22"),
    "two objects": (("corpus", b'{"text": "a"}{"text": "b"}'), "broken JSON: extra data at column 14"),
    "two objects with unread fields": (
        ("corpus", b'{"text": "a", "x": 1} {"text": "b", "x": 1}'),
        "broken JSON: extra data at column 23",
    ),
    "a blank line": (("corpus", b""), "blank line"),
    "spaces around": (("corpus", b'  {"text": "a"} \t'), KEPT),
    "a Windows line end": (("corpus", b'{"text": "a"}\r'), KEPT),
    "a carriage return within": (("corpus", b'{"text":\r"a"}'), KEPT),
    # the types of unread fields
    "an unread number": (corpus(b"1"), KEPT),
    "an unread text": (corpus(b'"a"'), KEPT),
    "an unread date": (corpus(b'"2020-01-01"'), KEPT),
    "an unread list of everything": (corpus(b'[1, "a", null, {}, [true]]'), KEPT),
    "an unread object in a message": (chat(b'{"name": {"first": 1}}'), KEPT),
    "an instruction": (("chat", b'{"instruction": "i", "input": "n", "target": "t", "x": 1}'), KEPT),
}
UNREAD = (b"1", b'"a"', b"1.5", b"[]", b"{}", b"null", b'{"deep": [1, {"er": null}]}')


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def run(name: str, lines: list[bytes]) -> Rows:
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return read_rows(path, RECORD_TYPES[name])

    return run


def fate(rows: Rows, line: int) -> tuple[str, Any]:
    """Why the row was rejected, or what was kept of it."""
    [reason] = [rejected.reason for rejected in rows.rejected if rejected.line == line] or [KEPT]
    return reason, rows.frame.filter(pl.col(LINE) == line).drop(LINE).to_dicts()


@pytest.mark.parametrize("case", ROWS)
def test_a_row_has_one_result_whatever_stands_around_it(case: str, read: Any) -> None:
    (name, row), reason = ROWS[case]
    clean = CLEAN[name]
    unread = [clean.replace(b"{", b'{"x": ' + value + b", ", 1) for value in UNREAD]
    alone = read(name, [row])
    found, kept = fate(alone, 1)
    assert (found, bool(kept)) == (reason, not reason)
    around = {
        "among clean rows": ([clean] * 100, [clean] * 100),
        "beside a broken row": ([clean] * 3, [BROKEN]),
        "among clean rows and a broken one": ([clean] * 100, [clean] * 100 + [BROKEN]),
        "among rows with unread fields": (unread * 20, unread * 20),
        "itself many times": ([row] * 50, [row] * 50),
    }
    for where, (before, after) in around.items():
        rows = read(name, [*before, row, *after])
        assert fate(rows, len(before) + 1) == (reason, kept), where
        assert len(rows.frame) + len(rows.rejected) == len(before) + 1 + len(after), where
        assert rows.ignored == alone.ignored | ({"x"} if unread[0] in before else set()), where


@pytest.mark.parametrize("levels", [20_000, 100_000])
@pytest.mark.parametrize("around", [b"", CLEAN["corpus"] + b"\n", BROKEN + b"\n"], ids=["alone", "clean", "broken"])
def test_deep_nesting_ends_no_process(levels: int, around: bytes, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(
        around * 100 + corpus(lists(levels))[1] + b"\n" + corpus(objects(levels))[1] + b"\n" + around * 100
    )
    program = (
        "import sys; from pathlib import Path; from twinloop.records.validation import check_rows;"
        "from twinloop.domains.domain import Domain;"
        "path = Path(sys.argv[1]);"
        "rejected = check_rows(path.parent, [path], Domain().record_types()['corpus'])[0].rejected;"
        "print([one.reason for one in rejected if 'deep' in one.reason])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str([TOO_DEEP] * 2)), done.stderr


def test_the_names_of_unread_fields_are_those_of_every_row(read: Any) -> None:
    lines = [CLEAN["chat"]] * 200
    lines[70] = chat(b'{"deeper": 1}')[1]
    lines[140] = CLEAN["chat"].replace(b"{", b'{"source": {"messages": []}, "facts": {"z": 1}, ', 1)
    assert read("chat", lines).ignored == {"messages.x", "source", "facts.z"}
    assert read("chat", [*lines, BROKEN]).ignored == {"messages.x", "source", "facts.z"}


def test_no_type_is_inferred_from_what_nobody_reads(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    table = jsonl._arrow_table

    def counted(*args: Any) -> pa.Table | None:
        made = table(*args)
        if made is not None:
            seen.append(made.num_columns)
        return made

    monkeypatch.setattr(jsonl, "_arrow_table", counted)
    lines = [
        json.dumps({"text": f"page {n}", "scores": {f"reader {n}": n}, f"key {n}": n}).encode() for n in range(5000)
    ]
    rows = read("corpus", lines)
    assert (len(rows.frame), seen) == (5000, [1])
    assert rows.ignored == {"scores", *(f"key {n}" for n in range(5000))}


# --- random rows

VALUES = (
    *(
        "1",
        "-0",
        "01",
        "+1",
        "1.",
        "1e5",
        "1e999",
        "9223372036854775808",
        "NaN",
        "Infinity",
        "-NaN",
        "true",
        "null",
        "nul",
    ),
    *('""', '"a"', '"\\ud800"', '"\\u0000"', '"\\q"', '"[{"', '"\\"}"', "'a'", "/**/1", "1\v", "\r1"),
    *("{}", "[]", "[1,]", '{"a":1,"a":2}', '{"":1}', "[null]", "[[],{}]", "[NaN]", '{"text":5}', '{"role":"user"}'),
)
KEYS = ("x", "text", "messages", "role", "content", "facts", "version", "instruction", "te\\u0078t", "", "\\ud800")
FORM_KEYS = (
    "conversations",
    "from",
    "value",
    "system",
    "history",
    "output",
    "completion",
    "prompt",
    "chosen",
    "rejected",
)


def a_key(rng: random.Random) -> str:
    return f'"{rng.choice(KEYS + FORM_KEYS)}"'


def a_value(rng: random.Random, levels: int = 3) -> str:
    roll = rng.random()
    if not levels or roll < 0.6:
        return rng.choice(VALUES)
    some = [a_value(rng, levels - 1) for _ in range(rng.randrange(4))]
    return f"[{','.join(some)}]" if roll < 0.8 else f"{{{','.join(f'{a_key(rng)}:{one}' for one in some)}}}"


def disturbed(rng: random.Random, line: str) -> bytes:
    """The line with random fields put into its objects, or a value replaced."""
    place = rng.choice([i for i, character in enumerate(line) if character in "{:"])
    if line[place] == ":":
        end = min(i for i in (line.find(mark, place) for mark in ",}") if i > 0)
        return (line[: place + 1] + a_value(rng) + line[end:]).encode()
    return (line[: place + 1] + f"{a_key(rng)}:{a_value(rng)}," + line[place + 1 :]).encode()


@pytest.mark.parametrize("name", CLEAN)
def test_random_rows_that_pyarrow_accepts_are_what_json_makes_of_them(name: str) -> None:
    rng, record, accepted = random.Random(name), RECORD_TYPES[name], 0
    for _ in range(1500):
        lines = [CLEAN[name], disturbed(rng, CLEAN[name].decode()), CLEAN[name]]
        fast = jsonl._fast(b"\n".join(lines), 1, len(lines), record)
        if fast is not None:
            careful = jsonl._careful(list(enumerate(lines, 1)), record)
            assert fast.frame.equals(careful.frame), lines
            assert (fast.rejected, fast.ignored) == (careful.rejected, careful.ignored), lines
            accepted += 1
    assert accepted > 200
