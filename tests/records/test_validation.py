"""Bad input of every kind, through the stage's interface: nothing crashes, no row is lost, every fault is reported."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from validating import RECORD_TYPES, SPLIT_KEYS, dump, lines_of, row, write

from twinloop.common.errors import UserError
from twinloop.records.validated import read_records
from twinloop.tasks.recipe import ValidateSettings

# --- good data


def test_generated_data_passes_whole(check, data: Path, tmp_path: Path) -> None:
    report = check(ValidateSettings(max_quarantined=0, split_keys=SPLIT_KEYS))
    assert report.quarantined == 0
    for name, record in RECORD_TYPES.items():
        originals = [json.loads(line) for line in lines_of(data / f"{name}.jsonl")]
        assert read_records(tmp_path / "out", name) == [dict.fromkeys(record.columns) | one for one in originals]


def test_the_same_data_gives_the_same_bytes(check, tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()}

    check()
    first = contents()
    check()
    assert contents() == first


def test_parquet_is_read_as_jsonl_is(check, data: Path, tmp_path: Path) -> None:
    check()
    expected = {name: read_records(tmp_path / "out", name) for name in RECORD_TYPES}
    for name in RECORD_TYPES:
        shutil.move(tmp_path / "out" / f"{name}.parquet", data / f"{name}.parquet")
        (data / f"{name}.jsonl").unlink()
    report = check()
    assert report.quarantined == 0
    assert {name: read_records(tmp_path / "out", name) for name in RECORD_TYPES} == expected


def test_windows_line_ends_a_byte_order_mark_and_a_missing_last_newline_are_no_fault(check, data: Path) -> None:
    path = data / "corpus.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines_of(path)))
    report = check()
    assert report.files["corpus"].quarantined == 0
    assert report.files["corpus"].kept == len(lines_of(path))


def test_fields_that_nobody_reads_are_reported(check, data: Path) -> None:
    path = data / "chat.jsonl"
    rows = [json.loads(line) | {"source": number} for number, line in enumerate(lines_of(path))]
    for number, one in enumerate(rows):
        one["messages"][0]["name"] = f"customer {number}"
    write(path, [dump(one) for one in rows])
    assert check().files["chat"].ignored_fields == ["messages.name", "source"]


def test_instruction_and_plain_prompts_become_messages(check, data: Path, tmp_path: Path) -> None:
    reference = json.loads((Path(__file__).parents[1] / "reference_cases.json").read_text())
    write(data / "chat.jsonl", [dump(reference["sft_example"])])
    write(data / "preferences.jsonl", [dump(reference["preference_pair"])])
    report = check()
    assert report.quarantined == 0
    assert report.files["chat"].ignored_fields == []
    [example] = read_records(tmp_path / "out", "chat")
    question = (
        'Decide return eligibility for A10234 using policy evidence.\n{"reason": "damaged", "days_since_delivery": 12}'
    )
    assert [m["role"] for m in example["messages"]] == ["user", "assistant"]
    assert example["messages"][0]["content"] == question
    assert json.loads(example["messages"][1]["content"]) == reference["sft_example"]["target"]
    [pair] = read_records(tmp_path / "out", "preferences")
    assert pair["prompt"] == [{"role": "user", "content": reference["preference_pair"]["prompt"]}]
    assert pair["chosen"] == reference["preference_pair"]["chosen"]


# --- bad rows


def changed(path: str, value: Any = None, *, drop: bool = False) -> Callable[[dict[str, Any]], bytes]:
    def change(one: dict[str, Any]) -> bytes:
        *parents, last = path.split(".")
        place: Any = one
        for key in parents:
            place = place[int(key) if key.lstrip("-").isdigit() else key]
        if drop:
            del place[last]
        else:
            place[last] = value
        return dump(one)

    return change


DAYS, CONFIRMED = "facts.order.days_since_delivery", "facts.order.damage_confirmed"
BAD_ROWS: dict[str, tuple[str, Callable[[dict[str, Any]], bytes], str]] = {
    "broken json": ("corpus", lambda r: dump(r)[:-1], "broken JSON: expecting ',' delimiter at column"),
    "not json": ("corpus", lambda r: b"hello", "broken JSON: expecting value at column 1"),
    "two on a line": ("corpus", lambda r: b'{"text":"a"}{"text":"b"}', "broken JSON: extra data at column 13"),
    "trailing comma": ("corpus", lambda r: dump(r) + b",", "broken JSON: extra data"),
    "no object": ("corpus", lambda r: b'["text"]', "not a JSON object but list"),
    "null": ("corpus", lambda r: b"null", "not a JSON object but null"),
    "blank": ("corpus", lambda r: b"   ", "blank line"),
    "bad utf-8": ("corpus", lambda r: b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at column 14"),
    "nul byte": ("corpus", lambda r: b'{"text": "a\0b"}', "holds a NUL byte at column 12"),
    "escaped nul": ("corpus", lambda r: b'{"text": "a\\u0000b"}', "text holds a NUL byte"),
    "control character": ("corpus", lambda r: b'{"text": "a\tb"}', "broken JSON: invalid control character"),
    "half a surrogate": ("corpus", lambda r: b'{"text": "\\ud83d"}', "text holds half of a surrogate pair"),
    "duplicate key": ("corpus", lambda r: b'{"text": "a", "text": "b"}', "broken JSON: a key appears twice"),
    "not a number": ("corpus", lambda r: b'{"text": NaN}', "broken JSON: NaN is no JSON value"),
    "endless number": ("corpus", lambda r: b'{"text": ' + b"1" * 5000 + b"}", "text is too large a number"),
    "endless nesting": ("corpus", lambda r: b"[" * 100_000, "broken JSON: nested too deep"),
    "missing key": ("corpus", lambda r: b'{"txt": "a"}', "text is missing"),
    "null text": ("corpus", lambda r: b'{"text": null}', "text is missing"),
    "empty object": ("corpus", lambda r: b"{}", "text is missing"),
    "wrong type": ("corpus", lambda r: b'{"text": 5}', "text is integer, not text"),
    "empty text": ("corpus", lambda r: b'{"text": " "}', "text is empty"),
    "over-long text": ("corpus", lambda r: dump({"text": "a" * 1_000_001}), "text is longer than 1000000 characters"),
    "over-long message": (
        "chat",
        changed("messages.0.content", "a" * 100_001),
        "messages has a message longer than 100000 characters",
    ),
    "no messages": ("chat", changed("messages", drop=True), "messages is missing"),
    "messages of another type": ("chat", changed("messages", "hello"), "messages is text, not list"),
    "a null among the messages": ("chat", changed("messages", [None]), "messages is missing"),
    "message without role": ("chat", changed("messages.0.role", drop=True), "messages.role is missing"),
    "content of another type": (
        "chat",
        changed("messages.0.content", ["a"]),
        "messages.content is list, not text",
    ),
    "unknown role": ("chat", changed("messages.0.role", "tool"), "messages has an unknown role (known:"),
    "no answer": ("chat", changed("messages.-1.role", "user"), "messages does not end with the assistant"),
    "answer that is no JSON": ("chat", changed("messages.-1.content", "Yes."), "the answer has no eligible"),
    "answer without policy_id": (
        "chat",
        changed("messages.-1.content", '{"eligible": true, "evidence": "looks acceptable"}'),
        "the answer has no policy_id",
    ),
    "answer of wrong type": (
        "chat",
        changed("messages.-1.content", '{"eligible": "true", "policy_id": "P-7", "evidence": "within 30 days"}'),
        "the answer has eligible of type str, not bool",
    ),
    "chosen is rejected": (
        "preferences",
        lambda r: dump(r | {"rejected": r["chosen"]}),
        "chosen and rejected are the same",
    ),
    "no rejected": ("preferences", changed("rejected", drop=True), "rejected is missing"),
    "no facts": ("prompts", changed("facts", drop=True), "facts is missing"),
    "facts with a gap": ("prompts", changed(CONFIRMED, drop=True), f"{CONFIRMED} is missing"),
    "boolean as text": ("prompts", changed(CONFIRMED, "no"), f"{CONFIRMED} is text"),
    "days as text": ("prompts", changed(DAYS, "12"), "facts.order.days_since_delivery is text"),
    "days as boolean": ("prompts", changed(DAYS, True), f"{DAYS} is"),
    "days as fraction": ("prompts", changed(DAYS, 12.0), f"{DAYS} is"),
    "days beyond 64 bits": ("prompts", changed(DAYS, 2**70), f"{DAYS} is"),
    "prompt that is answered": (
        "prompts",
        changed("prompt.0.role", "assistant"),
        "prompt does not end with the user",
    ),
    "unknown kind": ("cases", changed("kind", "easy"), "kind is none of"),
    "wrong expectation": ("cases", changed("expected.policy_id", "P-0"), "expected.policy_id is not the policy"),
    "policy without a window": ("documents", changed("text", "damaged items."), 'the text must say "within N days"'),
    "policy with an id of another form": ("documents", changed("document_id", "7"), "the id must be P- and a number"),
    "policy without text": ("documents", changed("text", drop=True), "text is missing"),
}


@pytest.mark.parametrize(("name", "make", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("number", [1, 4])
def test_a_bad_row_is_quarantined_with_its_reason_and_line(
    name: str, make: Callable, reason: str, number: int, check, data: Path, quarantined
) -> None:
    path = data / f"{name}.jsonl"
    lines = lines_of(path)
    bad = make(json.loads(lines[number - 1]))
    write(path, [*lines[: number - 1], bad, *lines[number:]])
    report = check().files[name]
    [found] = quarantined(name)
    assert found["line"] == number
    assert found["reason"].startswith(reason)
    assert (base64.b64decode(found["base64"]) if "base64" in found else found["row"].encode()) == bad
    assert (report.rows, report.kept, report.quarantined) == (len(lines), len(lines) - 1, 1)
    assert sum(report.reasons.values()) == 1


def test_the_good_rows_around_bad_ones_are_kept_in_their_order(check, data: Path, tmp_path: Path) -> None:
    path = data / "corpus.jsonl"
    lines = lines_of(path)
    write(path, [part for line in lines for part in (line, b"{broken")])
    assert check().files["corpus"].quarantined == len(lines)
    assert [dump({"text": r["text"]}) for r in read_records(tmp_path / "out", "corpus")] == [
        dump(json.loads(x)) for x in lines
    ]


@pytest.mark.parametrize("name", RECORD_TYPES)
def test_duplicate_rows_are_quarantined_and_the_first_is_kept(name: str, check, data: Path, quarantined) -> None:
    path = data / f"{name}.jsonl"
    lines = lines_of(path)
    spaced = json.dumps(json.loads(lines[2]), indent=None, separators=(" , ", " : ")).encode()
    write(path, [*lines, spaced])
    report = check().files[name]
    assert quarantined(name) == [
        {"file": f"{name}.jsonl", "line": len(lines) + 1, "reason": "duplicate of line 3", "row": spaced.decode()}
    ]
    assert report.reasons == {"duplicate": 1}


def test_rows_that_are_there_twice_do_not_make_a_file_unusable(check, data: Path) -> None:
    path = data / "corpus.jsonl"
    lines = lines_of(path)
    write(path, [*lines, *lines])
    report = check().files["corpus"]
    assert (report.kept, report.reasons) == (len(lines), {"duplicate": len(lines)})


def test_a_repeated_case_id_is_a_duplicate(check, data: Path, quarantined) -> None:
    path = data / "cases.jsonl"
    lines = lines_of(path)
    write(path, [*lines[:1], dump(json.loads(lines[1]) | {"case_id": row(path)["case_id"]}), *lines[2:]])
    check()
    assert [found["reason"] for found in quarantined("cases")] == ["duplicate of line 1"]


# --- Parquet of a user's own


def test_bad_rows_of_parquet_are_quarantined(check, data: Path, quarantined) -> None:
    frame = pl.DataFrame({"text": ["good", None, "", "good", "fine"]})
    frame.write_parquet(data / "corpus.parquet", row_group_size=2)
    (data / "corpus.jsonl").unlink()
    report = check(ValidateSettings(max_quarantined=0.7, split_keys=SPLIT_KEYS)).files["corpus"]
    assert (report.rows, report.kept) == (5, 2)
    assert [(r["line"], r["reason"]) for r in quarantined("corpus")] == [
        (2, "text is missing"),
        (3, "text is empty"),
        (4, "duplicate of line 1"),
    ]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, 2], "text is integer, not text"),
        ([b"a", b"b"], "text is bytes, not text"),
        ([["a"], ["b"]], "text is list"),
    ],
    ids=["integers", "bytes", "lists"],
)
def test_parquet_columns_of_another_type_are_refused(values: list[Any], reason: str, check, data: Path) -> None:
    pl.DataFrame({"text": values}).write_parquet(data / "corpus.parquet")
    (data / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=reason):
        check()


def test_narrow_integers_and_categories_of_parquet_are_welcome(check, data: Path, tmp_path: Path) -> None:
    documents = [json.loads(line) for line in lines_of(data / "documents.jsonl")]
    frame = pl.DataFrame([document | {"version": 3} for document in documents])
    frame.with_columns(pl.col("version").cast(pl.Int16), pl.col("document_id").cast(pl.Categorical)).write_parquet(
        data / "documents.parquet"
    )
    (data / "documents.jsonl").unlink()
    assert check().files["documents"].quarantined == 0
    assert read_records(tmp_path / "out", "documents") == [document | {"version": 3} for document in documents]


def test_a_file_that_is_no_parquet_is_reported(check, data: Path) -> None:
    (data / "corpus.parquet").write_bytes(b"PAR1 not really")
    (data / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"corpus\.parquet: not a readable Parquet file") as raised:
        check()
    assert "\n" not in str(raised.value)


# --- what stops the run


def test_too_many_bad_rows_stop_the_run_with_one_line(check, data: Path, quarantined) -> None:
    path = data / "prompts.jsonl"
    lines = lines_of(path)
    write(path, [*lines[:-2], b"{", b"hello"])
    check(ValidateSettings(max_quarantined=2 / len(lines), split_keys=SPLIT_KEYS))
    with pytest.raises(UserError) as raised:
        check(ValidateSettings(max_quarantined=1.9 / len(lines), split_keys=SPLIT_KEYS))
    message = str(raised.value)
    assert "\n" not in message
    assert f"prompts.jsonl: 2 of {len(lines)} rows cannot be used" in message
    assert f"the first is line {len(lines) - 1}: broken JSON" in message
    assert "each is in " in message
    assert "quarantine/prompts.jsonl; fix the file" in message
    assert [r["line"] for r in quarantined("prompts")] == [len(lines) - 1, len(lines)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "corpus.jsonl").unlink(), r"no corpus\.jsonl or corpus\.parquet"),
        (lambda d: (d / "corpus.jsonl").write_bytes(b""), r"corpus\.jsonl: holds no rows"),
        (lambda d: (d / "corpus.jsonl").write_bytes(b"\n\n"), r"2 of 2 rows cannot be used .* 2 x blank line"),
        (lambda d: (d / "corpus.parquet").write_bytes(b""), r"both corpus\.jsonl and corpus\.parquet"),
        (lambda d: shutil.rmtree(d), r"no corpus\.jsonl or corpus\.parquet"),
    ],
    ids=["file gone", "file empty", "file blank", "two files", "folder gone"],
)
def test_missing_and_ambiguous_files_are_reported(
    change: Callable[[Path], Any], message: str, check, data: Path
) -> None:
    change(data)
    with pytest.raises(UserError, match=message):
        check(ValidateSettings(max_quarantined=1.0, split_keys=SPLIT_KEYS))
