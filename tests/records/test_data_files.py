"""Which files hold the rows of which record type: further files, folders of parts, and those that nothing reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from twinloop.common.errors import UserError
from twinloop.domains.chat import domain as chat
from twinloop.domains.domain import Domain
from twinloop.records.files import find_data
from twinloop.records.validated import read_records, source_line
from twinloop.records.validation import validate
from twinloop.tasks.recipe import ValidateSettings

RECORD_TYPES = chat.record_types()


def files_of(folder: Path, *names: str) -> dict[str, list[str]]:
    """The files of each record type where `folder` holds files of these names, and those that are ignored."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    data = find_data(folder, RECORD_TYPES)
    found = {kind: [path.relative_to(folder).as_posix() for path in paths] for kind, paths in data.of.items()}
    return found | ({"ignored": sorted(data.ignored)} if data.ignored else {})


@pytest.mark.parametrize(
    "name",
    [
        *("chat.jsonl", "chat.parquet", "chat.jsonl.gz", "chat.jsonl.zst"),
        *("chat_2.jsonl", "chat-2.parquet", "chat.2.jsonl", "chat_batch2.jsonl", "chat-part-0007.parquet"),
        *("chat-00001-of-00001.parquet", "chat_2026-11-03.jsonl.gz", "chat_shard_3.jsonl", "chat-chunk1.jsonl"),
        *("chat/part-0.parquet", "chat/train-00000-of-00001.parquet", "chat/monday.jsonl", "chat/chat.jsonl.zst"),
    ],
)
def test_a_file_of_a_record_type(name: str, tmp_path: Path) -> None:
    assert files_of(tmp_path, name) == {"chat": [name]}


@pytest.mark.parametrize(
    "name",
    [
        *("sft_examples_batch2.jsonl", "chat.csv", "chat.json", "chat.jsonl.bz2", "chat.parquet.gz", "notes.txt"),
        *("chat_test.jsonl", "chat_copy.jsonl", "chat2.jsonl", "corpus_held_out.jsonl", "corpus_eval_2.jsonl"),
        *("chat/notes.txt", "chat/test-00000-of-00001.parquet", "chat/Validation.jsonl", "chat/my_eval.jsonl"),
    ],
)
def test_a_file_that_nothing_reads(name: str, tmp_path: Path) -> None:
    assert files_of(tmp_path, name) == {"ignored": [name]}


def test_a_folder_of_no_record_type_is_ignored_as_one(tmp_path: Path) -> None:
    assert files_of(tmp_path, "archive/chat.jsonl", "chat/old/part-0.jsonl") == {"ignored": ["archive/", "chat/old"]}


def test_hidden_files_are_nobodys(tmp_path: Path) -> None:
    assert files_of(tmp_path, ".DS_Store", "._chat.jsonl", ".gitignore", "chat/.part-0.parquet.crc") == {}


def test_names_that_are_no_text_are_ignored_and_can_be_printed(tmp_path: Path) -> None:
    names = [os.fsdecode(b"chat\xff.jsonl"), "two\nlines.csv", os.fsdecode(b"chat/\xff.jsonl")]
    assert files_of(tmp_path, *names) == {"ignored": ["chat/?.jsonl", "chat?.jsonl", "two?lines.csv"]}


def test_a_held_out_record_type_is_its_own_and_not_a_further_file(tmp_path: Path) -> None:
    names = ["corpus.jsonl", "corpus_2.jsonl", "corpus_heldout.jsonl", "corpus_heldout_2.jsonl"]
    assert files_of(tmp_path, *names, "corpus_heldout/test-0.jsonl", "chat_heldout/eval.jsonl") == {
        "corpus": names[:2],
        "corpus_heldout": [*names[2:], "corpus_heldout/test-0.jsonl"],
        "chat_heldout": ["chat_heldout/eval.jsonl"],
    }


def test_files_are_read_in_the_order_of_their_numbers_and_the_folder_last(tmp_path: Path) -> None:
    ordered = [
        "chat.jsonl",
        "chat_2.jsonl",
        "chat_9.parquet",
        "chat_10.jsonl",
        "chat/part-2.jsonl",
        "chat/part-10.jsonl",
    ]
    assert files_of(tmp_path, *reversed(ordered)) == {"chat": ordered}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("chat.parquet", "chat.jsonl"), "both chat.jsonl and chat.parquet; remove one"),
        (("chat_2.jsonl.gz", "chat_2.jsonl"), "both chat_2.jsonl and chat_2.jsonl.gz; remove one"),
        (("chat/a.jsonl", "chat/a.jsonl.zst"), "both a.jsonl and a.jsonl.zst; remove one"),
        (("chat-00000-of-00003.parquet", "chat-00002-of-00003.parquet"), "2 of 3 files chat-…-of-00003"),
        (("chat/train-1-of-2.jsonl", "chat/other-2-of-2.jsonl"), "1 of 2 files"),
    ],
)
def test_what_is_there_twice_or_only_in_part_is_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        files_of(tmp_path, *names)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# --- through validation


def said(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]}


def write(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows a to f in four files, of which two are broken and one is there twice."""
    folder = tmp_path / "data"
    write(folder / "chat.jsonl", said("a"), "{broken", said("b"))
    write(folder / "chat_2.jsonl", said("c"), said("a"))
    (folder / "chat").mkdir()
    pl.DataFrame([said("d"), said("e")]).write_parquet(folder / "chat" / "part-0.parquet")
    write(folder / "chat" / "part-1.jsonl", "", said("f"))
    write(folder / "chat_heldout.jsonl", said("g"))
    return folder


def test_several_files_are_one_record_type_and_each_row_keeps_its_place(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = validate(data, out, ValidateSettings(max_quarantined=0.5), chat, ["chat", "cases"])
    file = report.files["chat"]
    assert (file.rows, file.kept, file.quarantined) == (9, 6, 3)
    assert file.files == {"chat.jsonl": 3, "chat_2.jsonl": 2, "chat/part-0.parquet": 2, "chat/part-1.jsonl": 2}
    assert [record["messages"][0]["content"] for record in read_records(out, "chat")] == list("abcdef")
    assert [source_line(out, "chat", index) for index in range(6)] == [
        *(("chat.jsonl", 1), ("chat.jsonl", 3), ("chat_2.jsonl", 1)),
        *(("chat/part-0.parquet", 1), ("chat/part-0.parquet", 2), ("chat/part-1.jsonl", 2)),
    ]
    quarantine = [json.loads(line) for line in (out / "quarantine" / "chat.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["row"]) for row in quarantine] == [
        ("chat.jsonl", 2, "{broken"),
        ("chat_2.jsonl", 2, json.dumps(said("a"))),
        ("chat/part-1.jsonl", 1, ""),
    ]
    assert quarantine[1]["reason"] == "duplicate of line 1 of chat.jsonl"


def test_a_leak_is_named_by_the_file_that_it_is_in(data: Path, tmp_path: Path) -> None:
    write(data / "chat_heldout_2.jsonl", said("h"), said("e"))
    with pytest.raises(UserError) as raised:
        validate(data, tmp_path / "out", ValidateSettings(max_quarantined=0.5), chat, ["chat", "cases"])
    train, held_out = data / "chat" / "part-0.parquet", data / "chat_heldout_2.jsonl"
    assert f"{train} line 2: its text is also in held-out {held_out} line 2;" in str(raised.value)


def test_too_many_bad_rows_are_counted_over_all_files(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat\.jsonl and 3 more: 2 of 9 rows .* the first is line 2 of chat\.jsonl:"):
        validate(data, tmp_path / "out", ValidateSettings(), chat, ["chat", "cases"])


def test_what_nothing_reads_is_in_the_report_and_in_the_message_of_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path / "data" / "corpus_heldout.jsonl", {"text": "a"})
    write(tmp_path / "data" / "corpus_test.jsonl", {"text": "b"})
    (tmp_path / "data" / "notes.csv").touch()
    report = validate(tmp_path / "data", tmp_path / "out", ValidateSettings(), Domain(), ["corpus_heldout"])
    assert report.ignored_files == {
        "corpus_test.jsonl": "no record type has this name; a further file of corpus is corpus_2.jsonl",
        "notes.csv": "not .jsonl, .parquet, .jsonl.gz or .jsonl.zst",
    }
    with pytest.raises(UserError, match=r"no corpus\.jsonl .*; nothing reads corpus_test\.jsonl, notes\.csv"):
        validate(tmp_path / "data", tmp_path / "out", ValidateSettings(), Domain(), ["corpus"])
