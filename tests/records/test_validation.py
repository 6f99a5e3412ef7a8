"""Bad input of every kind, through the stage's interface: nothing crashes, no row is lost, every fault is reported."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from twinloop.common.errors import UserError
from twinloop.domains.returns import domain
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.records import jsonl
from twinloop.records.reading import read_rows
from twinloop.records.rows import LINE
from twinloop.records.validated import read_records
from twinloop.records.validation import ValidationReport, check_rows, validate
from twinloop.tasks.recipe import ValidateSettings

COUNT = 80
PARAMS = GeneratorParams(**{name: COUNT for name, field in GeneratorParams.model_fields.items() if field.is_required()})
RECORD_TYPES = domain.record_types()
SPLIT_KEYS: list[str] = ["text", "order_id", "policy_id", "window_and_days"]
LENIENT = ValidateSettings(max_quarantined=0.5, split_keys=SPLIT_KEYS)


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    generate(PARAMS, folder)
    return folder


@pytest.fixture
def data(generated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(generated, tmp_path / "data")


@pytest.fixture
def check(data: Path, tmp_path: Path) -> Callable[..., ValidationReport]:
    """Validates the folder `data` into `out`."""

    def run(settings: ValidateSettings = LENIENT) -> ValidationReport:
        return validate(data, tmp_path / "out", settings, domain, RECORD_TYPES)

    return run


@pytest.fixture
def quarantined(tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    def read(name: str) -> list[dict[str, Any]]:
        path = tmp_path / "out" / "quarantine" / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return read


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def write(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def row(path: Path, number: int = 1) -> dict[str, Any]:
    return json.loads(lines_of(path)[number - 1])


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


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
    assert quarantined(name) == [{"line": len(lines) + 1, "reason": "duplicate of line 3", "row": spaced.decode()}]
    assert report.reasons == {"duplicate": 1}


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


def test_a_file_that_is_no_parquet_is_told(check, data: Path) -> None:
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
    told = str(raised.value)
    assert "\n" not in told
    assert f"prompts.jsonl: 2 of {len(lines)} rows cannot be used" in told
    assert f"the first is line {len(lines) - 1}: broken JSON" in told
    assert [r["line"] for r in quarantined("prompts")] == [len(lines) - 1, len(lines)]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: (d / "corpus.jsonl").unlink(), r"no corpus\.jsonl or corpus\.parquet"),
        (lambda d: (d / "corpus.jsonl").write_bytes(b""), r"corpus\.jsonl: holds no rows"),
        (lambda d: (d / "corpus.jsonl").write_bytes(b"\n\n"), r"2 of 2 rows cannot be used .* 2 x blank line"),
        (lambda d: (d / "corpus.parquet").write_bytes(b""), r"both corpus\.jsonl and corpus\.parquet"),
        (lambda d: shutil.rmtree(d), r"no corpus\.jsonl or corpus\.parquet"),
    ],
    ids=["file gone", "file empty", "file blank", "two files", "folder gone"],
)
def test_missing_and_ambiguous_files_are_told(damage: Callable[[Path], Any], told: str, check, data: Path) -> None:
    damage(data)
    with pytest.raises(UserError, match=told):
        check(ValidateSettings(max_quarantined=1.0, split_keys=SPLIT_KEYS))


def held_out_case(data: Path, kind: str = "held_out") -> tuple[int, dict[str, Any]]:
    for number, line in enumerate(lines_of(data / "cases.jsonl"), 1):
        case = json.loads(line)
        if case["kind"] == kind:
            return number, case
    raise AssertionError(kind)


def append(path: Path, record: dict[str, Any]) -> int:
    lines = lines_of(path)
    write(path, [*lines, dump(record)])
    return len(lines) + 1


def refused(check: Callable[..., ValidationReport], split_keys: list[str] = SPLIT_KEYS) -> str:
    with pytest.raises(UserError) as raised:
        check(ValidateSettings(max_quarantined=0.5, split_keys=split_keys))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["chat", "preferences", "prompts"])
def test_a_held_out_prompt_in_training_stops_the_run(name: str, check, data: Path) -> None:
    number, case = held_out_case(data)
    asked = [m | {"content": m["content"].upper().replace(" ", "  ")} for m in case["prompt"]]
    record = row(data / f"{name}.jsonl")
    if name == "chat":
        record["messages"] = [{"role": "system", "content": "Decide."}, *asked, record["messages"][-1]]
    else:
        record["prompt"] = asked
    line = append(data / f"{name}.jsonl", record)
    told = refused(check, ["text"])
    assert f"{name}.jsonl line {line}: its text is also in held-out" in told
    assert f"cases.jsonl line {number}" in told


def test_a_held_out_document_in_the_corpus_stops_the_run(check, data: Path) -> None:
    line = append(data / "corpus.jsonl", row(data / "corpus_heldout.jsonl", 5))
    assert f"corpus.jsonl line {line}: its text is also in held-out" in refused(check, ["text"])


def test_a_held_out_order_in_training_stops_the_run(check, data: Path) -> None:
    _, case = held_out_case(data, "golden")
    record = row(data / "prompts.jsonl")
    record["facts"]["order"]["order_id"] = case["facts"]["order"]["order_id"]
    line = append(data / "prompts.jsonl", record)
    assert f"prompts.jsonl line {line}: order A10234 is also in held-out" in refused(check)


@pytest.mark.parametrize("told_of", ["order", "policy"])
def test_an_id_of_a_case_that_the_corpus_names_stops_the_run(told_of: str, check, data: Path) -> None:
    name = {"order": "A10234", "policy": "P-7"}[told_of]
    line = append(data / "corpus.jsonl", {"text": f"as was decided ({name}), so it is"})
    assert f"corpus.jsonl line {line}: {told_of} {name} is also in" in refused(check)


@pytest.mark.parametrize("text", ["order A102345", "XP-7", "P-70", "P-7-b", "p-7"])
def test_a_longer_word_is_not_the_id(text: str, check, data: Path) -> None:
    append(data / "corpus.jsonl", {"text": text})
    check(ValidateSettings(max_quarantined=0.5, split_keys=["order_id"]))
    ids = [case["facts"]["policy"]["policy_id"] for case in map(json.loads, lines_of(data / "cases.jsonl"))]
    if not set(text.split()) & set(ids):
        check()


def test_a_held_out_policy_even_as_a_distractor_stops_the_run(check, data: Path) -> None:
    record = row(data / "chat.jsonl")
    record["facts"]["passages"].append({"policy_id": "P-7", "text": "late items within 9 days are eligible."})
    line = append(data / "chat.jsonl", record)
    assert f"chat.jsonl line {line}: policy P-7 is also in held-out" in refused(check)
    check(ValidateSettings(max_quarantined=0.5, split_keys=["text", "order_id"]))


def test_a_held_out_pair_in_training_stops_the_run(check, data: Path) -> None:
    record = row(data / "preferences.jsonl")
    record["chosen"] += " "
    text = "damaged items within 30 days are eligible."
    record["facts"]["policy"] = {"policy_id": "P-2", "text": text, "window_days": 30}
    record["facts"]["passages"] = [{"policy_id": "P-2", "text": text}]
    record["facts"]["order"]["days_since_delivery"] = 45
    line = append(data / "preferences.jsonl", record)
    told = refused(check)
    assert f"preferences.jsonl line {line}: the pair of 30 days of window and day 45 is also in" in told


def test_every_leak_is_counted(check, data: Path) -> None:
    for number in (1, 2, 3):
        append(data / "corpus.jsonl", row(data / "corpus_heldout.jsonl", number))
    assert "(2 more rows leak)" in refused(check, ["text"])


# --- random damage


SPECIAL = [b'"', b"\\", b"{", b"}", b",", b"\n", b"\0", b"\xff", b"\r", b"[", b"null"]


def damaged(rng: random.Random, line: bytes) -> bytes:
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
def test_random_damage_loses_no_row_and_both_ways_of_reading_agree(
    name: str, seed: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{seed}/{name}")
    path = data / f"{name}.jsonl"
    rate = rng.choice([0.02, 0.3, 1.0])
    path.write_bytes(
        b"\n".join(damaged(rng, x) if rng.random() < rate else x for x in lines_of(path)[:150] * 2) + b"\n"
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
    checked = check_rows(path, record)
    assert len(checked.frame) + len(checked.rejected) == total
    originals = raw.split(b"\n")
    for rejected in checked.rejected:
        kept = base64.b64decode(rejected.base64) if rejected.base64 else rejected.row.encode()
        assert kept.rstrip(b"\r") == originals[rejected.line - 1].rstrip(b"\r")


def test_a_binary_file_is_no_crash(check, data: Path) -> None:
    (data / "corpus.jsonl").write_bytes(random.Random(1).randbytes(200_000))
    with pytest.raises(UserError, match="rows cannot be used"):
        check()
