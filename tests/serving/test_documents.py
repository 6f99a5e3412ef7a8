"""Documents: versions, durability, several processes, integrity, and finding the one that fits."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.domain import Document
from twinloop.domains.returns.domain import domain as returns
from twinloop.serving.knowledge import history
from twinloop.serving.knowledge.documents import (
    EMPTY_DIGEST,
    MAX_ID_CHARACTERS,
    MAX_TEXT_CHARACTERS,
    DocumentError,
    DocumentStore,
    DocumentStoreError,
)

DAMAGED = "damaged items reported within 30 days are eligible."
LATE = "late items reported within 14 days are eligible."
UNWANTED = "unwanted items within 10 days are eligible."
THREE = [Document("P-7", DAMAGED), Document("P-3", LATE), Document("P-12", UNWANTED)]


@pytest.fixture
def store(tmp_path):
    store = DocumentStore(tmp_path / "state" / "documents.db")
    store.seed(THREE)
    return store


def ids(documents):
    return [document.document_id for document in documents]


def found(store, query, limit):
    return ids(store.find(query, limit).documents)


def put_in_another_process(path, document_id, text):
    code = (
        "import sys; from twinloop.serving.knowledge.documents import DocumentStore; "
        "DocumentStore(sys.argv[1]).put(*sys.argv[2:])"
    )
    subprocess.run([sys.executable, "-c", code, str(path), document_id, text], check=True, timeout=60)


def test_put_makes_a_new_version_and_keeps_history(store):
    changed = store.put("P-7", "damaged items reported within 7 days are eligible.")
    assert changed.version == 2
    versions = store.history("P-7")
    assert [(each.document.version, each.document.text) for each in versions] == [(1, DAMAGED), (2, changed.text)]
    assert all(each.recorded_at.startswith("20") for each in versions)
    assert [document for document in store.list() if document.document_id == "P-7"] == [changed]


def test_putting_the_newest_text_again_changes_nothing(store):
    before = store.digest()
    assert store.put("P-7", f"  {DAMAGED} ") == Document("P-7", DAMAGED, 1)
    assert store.digest() == before


def test_documents_are_listed_as_people_order_them(store):
    assert ids(store.list()) == ["P-3", "P-7", "P-12"]


def test_the_reason_finds_its_policy_and_distractors_fill_the_rest(store):
    assert found(store, "damaged", 2) == ["P-7", "P-3"]
    assert found(store, "unwanted", 2) == ["P-12", "P-3"]
    assert found(store, "LATE arrival", 5) == ["P-3", "P-7", "P-12"]


def test_the_example_of_the_returns_domain_finds_its_documents(tmp_path):
    store = DocumentStore(tmp_path / "documents.db", returns.check_document)
    store.seed(returns.example_documents)
    query = returns.query(returns.request.model_validate(returns.example))
    assert store.find(query, returns.passages).documents == list(returns.example_documents)


def test_only_the_newest_version_is_found(store):
    store.put("P-7", "broken goods may come back within 7 days.")
    assert found(store, "damaged", 1) == ["P-3"]
    assert store.find("broken", 1).documents[0].version == 2


def test_other_forms_of_a_word_find_the_document(store):
    assert found(store, "damages", 1) == ["P-7"]
    assert found(store, "DAMAGE", 1) == ["P-7"]


def test_equal_scores_are_ordered_by_number(tmp_path):
    store = DocumentStore(tmp_path / "documents.db")
    store.seed([Document(f"P-{number}", DAMAGED) for number in (30, 4, 11)])
    assert found(store, "damaged", 3) == ["P-4", "P-11", "P-30"]


@pytest.mark.parametrize(
    "query",
    [
        'x" OR late', "NEAR(", '"', "*", "_", "text: late", "late -damaged", "late AND damaged", "NOT", "²", "漢字", "",
        "^late", "{text}: late", "late*", "a\0b", "\ud800", "rowid:1", "late + damaged", "(late", "word " * 100_000,
        " ".join(f"w{number}" for number in range(10_000)),
    ],
)  # fmt: skip
def test_a_query_is_words_and_never_syntax(store, query):
    assert len(found(store, query, 2)) == 2
    assert store.find(f"{query[:200]} damaged", 1).documents[0].document_id in ("P-7", "P-3")


def test_a_store_that_is_not_there_is_empty_and_reading_makes_no_file(tmp_path):
    store = DocumentStore(tmp_path / "absent" / "documents.db")
    assert store.find("damaged", 2).documents == []
    assert (store.list(), store.history("P-7"), store.count()) == ([], [], 0)
    assert store.digest() == EMPTY_DIGEST
    assert list(tmp_path.iterdir()) == []


def test_seed_leaves_a_store_that_holds_anything(store):
    assert store.seed([Document("P-1", DAMAGED)]) == 0
    assert ids(store.list()) == ["P-3", "P-7", "P-12"]


def test_seed_installs_all_or_nothing(tmp_path):
    store = DocumentStore(tmp_path / "documents.db", returns.check_document)
    with pytest.raises(DocumentError, match="P-2"):
        store.seed([Document("P-1", DAMAGED), Document("P-2", "no window here")])
    with pytest.raises(UserError, match="same id"):
        store.seed([Document("P-1", DAMAGED), Document("P-1", LATE)])
    assert store.list() == []


def test_equal_histories_have_equal_digests_whenever_they_were_put(tmp_path, store, monkeypatch):
    class Later(history.datetime):
        @classmethod
        def now(cls, zone):
            return cls(2031, 5, 1, tzinfo=zone)

    monkeypatch.setattr(history, "datetime", Later)
    other = DocumentStore(tmp_path / "other.db")
    other.seed(THREE)
    assert other.history("P-7")[0].recorded_at != store.history("P-7")[0].recorded_at
    assert other.digest() == store.digest()
    other.put("P-7", LATE)
    assert other.digest() != store.digest()


@pytest.mark.parametrize(
    ("document_id", "text", "said"),
    [
        ("", DAMAGED, "1 to 200 characters"),
        (" P-7", DAMAGED, "1 to 200 characters"),
        ("P" * (MAX_ID_CHARACTERS + 1), DAMAGED, "1 to 200 characters"),
        ("P-7\n8", DAMAGED, "cannot be seen"),
        ("P-\ud800", DAMAGED, "cannot be seen"),
        ("P-7", " \n ", "the text is empty"),
        ("P-7", "x" * (MAX_TEXT_CHARACTERS + 1), "at most"),
        ("P-7", "damaged\0items", "NUL"),
        ("P-7", "damaged\ud800items", "surrogate"),
    ],
)
def test_what_no_domain_could_use_is_refused_in_one_line(store, document_id, text, said):
    before = store.digest()
    with pytest.raises(DocumentError) as error:
        store.put(document_id, text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert store.digest() == before


@pytest.mark.parametrize(
    ("document_id", "text", "said"),
    [
        ("P-", DAMAGED, "must be P- and a number"),
        ("p-7", DAMAGED, "must be P- and a number"),
        ("P-07", DAMAGED, "must be P- and a number"),
        ("P-٧", DAMAGED, "must be P- and a number"),
        ("../P-7", DAMAGED, "must be P- and a number"),
        ("P-7", DAMAGED + "x" * 300, "at most"),
        ("P-7", "damaged items\nwithin 30 days", "character 14"),
        ("P-7", "damaged\u2028items within 30 days", "U+2028"),
        ("P-7", "damaged\u202eitems within 30 days", "U+202E"),
        ("P-7", "damaged items are eligible.", "within N days"),
        ("P-7", "within 30 days, or within 40 days", "exactly once"),
    ],
)
def test_what_the_domain_refuses_does_not_enter(tmp_path, document_id, text, said):
    store = DocumentStore(tmp_path / "documents.db", returns.check_document)
    with pytest.raises(DocumentError, match=r"^document '") as error:
        store.put(document_id, text)
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


# --- several processes ------------------------------------------------------------------------------------------------


def test_a_reader_sees_another_process_at_once(store):
    reader = DocumentStore(store.path)
    assert reader.find("damaged", 1).documents[0].version == 1
    put_in_another_process(store.path, "P-7", "damaged items reported within 7 days are eligible.")
    [document] = reader.find("damaged", 1).documents
    assert document == Document("P-7", "damaged items reported within 7 days are eligible.", 2)


def _put_many(path, worker, count):
    store = DocumentStore(path)
    for number in range(count):
        store.put("P-7", f"worker {worker} says within {number + 1} days")


@pytest.mark.parametrize("begun", [True, False])
def test_writers_in_many_processes_lose_nothing(tmp_path, begun):
    store = DocumentStore(tmp_path / "documents.db")
    if begun:
        store.put("P-7", DAMAGED)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_put_many, args=(store.path, worker, 20)) for worker in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        store.find("damaged", 2)  # a reader in the middle of it all never sees a partial write
    assert all(writer.exitcode == 0 for writer in writers)
    versions = [each.document for each in DocumentStore(store.path).history("P-7")]
    assert [document.version for document in versions] == list(range(1, 81 + begun))
    for worker in range(4):
        own = [document.text for document in versions if document.text.startswith(f"worker {worker} ")]
        assert own == [f"worker {worker} says within {number + 1} days" for number in range(20)]
    assert store.digest() == DocumentStore(store.path).digest()


def test_a_writer_killed_at_any_moment_leaves_only_whole_versions(store):
    code = """
import sys
from twinloop.serving.knowledge.documents import DocumentStore
store = DocumentStore(sys.argv[1])
number = 0
while True:
    number += 1
    document = store.put("P-7", f"damaged items within {number % 9000 + 1} days, put {number}")
    print(document.version, flush=True)
"""
    acknowledged = 1
    for round_ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(store.path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(0.02 * round_)
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        versions = [int(version) for version in [first, *rest]]
        assert versions[0] > acknowledged
        acknowledged = versions[-1]
        kept = [each.document.version for each in DocumentStore(store.path).history("P-7")]
        assert kept == list(range(1, len(kept) + 1))
        assert len(kept) - acknowledged in (0, 1)  # at most the put that was under way when it died
        assert store.put("P-7", f"after the kill, within {round_ + 1} days").version == len(kept) + 1
        acknowledged = len(kept) + 1


# --- integrity --------------------------------------------------------------------------------------------------------

UNGUARDED = "DROP TRIGGER no_update; DROP TRIGGER no_delete;"
CHANGES = {
    "a text": "UPDATE versions SET text = 'late items within 99 days' WHERE number = 2",
    "an id": "UPDATE versions SET document_id = 'P-9' WHERE number = 2",
    "a time": "UPDATE versions SET recorded_at = '2020-01-01T00:00:00+00:00' WHERE number = 2",
    "a row less": "DELETE FROM versions WHERE number = 2",
    "the last row less": "DELETE FROM versions WHERE number = 3",
    "the digest": "UPDATE head SET digest = 'd'",
    "the search index": "DELETE FROM search WHERE rowid = 2",
    "a text in the search index": "UPDATE search SET text = 'other words' WHERE rowid = 2",
    "the list": "DELETE FROM newest WHERE number = 2",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_beside_the_store_is_reported_and_never_served(store, change):
    with sqlite3.connect(store.path) as connection:
        connection.executescript(f"{UNGUARDED} {CHANGES[change]}")
    connection.close()
    for method in (lambda store: store.find("late", 1), lambda store: store.put("P-1", DAMAGED), DocumentStore.list):
        with pytest.raises(DocumentStoreError, match=r"documents.db: is corrupt \(.*restore a backup") as error:
            method(DocumentStore(store.path))
        assert "\n" not in str(error.value)
        assert str(store.path) not in error.value.reason


def test_a_text_that_changes_under_a_running_reader_is_not_served(store):
    assert found(store, "late", 1) == ["P-3"]
    with sqlite3.connect(store.path) as connection:
        connection.executescript(f"{UNGUARDED} {CHANGES['a text']}")
    connection.close()
    with pytest.raises(DocumentStoreError, match="version 1 of document 'P-3' is not what was put"):
        store.find("late", 1)


def test_versions_are_not_changed_by_mistake(store):
    with sqlite3.connect(store.path) as connection, pytest.raises(sqlite3.IntegrityError, match="never changed"):
        connection.execute(CHANGES["a text"])
    connection.close()
    assert store.list()


@pytest.mark.parametrize("place", [0, 4096, -2000])
def test_bytes_that_changed_on_the_disk_are_reported(store, place):
    store.close()
    content = bytearray(store.path.read_bytes())
    content[place : place + 400 if place >= 0 else None] = b"\xff" * 400
    store.path.write_bytes(content)
    with pytest.raises(DocumentStoreError, match="is corrupt"):
        DocumentStore(store.path).list()


def test_a_file_that_is_no_database_is_reported(tmp_path):
    (tmp_path / "documents.db").write_bytes(b"no database at all, " * 500)
    with pytest.raises(DocumentStoreError, match="file is not a database"):
        DocumentStore(tmp_path / "documents.db").list()


def test_a_backup_that_is_restored_under_a_running_reader_is_read_anew(tmp_path, store):
    assert store.list()
    other = DocumentStore(tmp_path / "other.db")
    other.seed([Document("P-1", UNWANTED)])
    with sqlite3.connect(other.path) as backup, sqlite3.connect(store.path) as target:
        backup.backup(target)
    backup.close()
    target.close()
    assert ids(store.list()) == ["P-1"]
    assert store.put("P-1", LATE).version == 2
    assert DocumentStore(store.path).digest() == store.digest() != other.digest()


def test_a_file_that_was_moved_away_is_an_empty_store_again(tmp_path, store):
    assert store.list()
    store.path.unlink()
    assert store.list() == []
    assert store.put("P-1", UNWANTED).version == 1
    assert ids(DocumentStore(store.path).list()) == ["P-1"]


def test_a_store_that_is_closed_is_one_file(tmp_path, store):
    digest = store.digest()
    store.close()
    assert [path.name for path in store.path.parent.iterdir()] == ["documents.db"]
    shutil.copy(store.path, tmp_path / "copy.db")
    assert DocumentStore(tmp_path / "copy.db").digest() == store.digest() == digest


# --- disks that fail, and a Python that cannot search -----------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=False).returncode:
        pytest.skip("a disk that can be filled needs the right to mount one")
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (2**12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


@pytest.mark.parametrize("begun", [True, False])
def test_a_put_on_a_full_disk_changes_nothing_and_says_so_in_one_line(disk, begun):
    store = DocumentStore(disk / "documents.db")
    if begun:
        store.put("P-7", DAMAGED)
    fill(disk)
    kept = len(store.history("P-7"))
    before = store.digest()
    with pytest.raises(
        DocumentStoreError, match=r"documents.db: cannot be written \(the disk is full\), nothing was changed"
    ) as error:
        store.put("P-8", "x" * 50_000)
    assert "\n" not in str(error.value)
    assert store.digest() == before
    (disk / "filler").unlink()
    assert DocumentStore(store.path).digest() == before
    assert store.put("P-7", LATE).version == kept + 1


def test_a_read_only_disk_is_named(disk):
    store = DocumentStore(disk / "read-only" / "documents.db")
    store.put("P-7", DAMAGED)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        with pytest.raises(DocumentStoreError, match=r"cannot be written \(Read-only file system\)"):
            store.put("P-7", LATE)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert store.put("P-7", LATE).version == 2


@pytest.mark.parametrize("name", ["file/documents.db", "folder"])
def test_a_place_where_no_store_can_be_is_named_in_one_line(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DocumentStoreError, match=f"{name}: cannot be written [(]") as error:
        DocumentStore(tmp_path / name).put("P-7", DAMAGED)
    assert "\n" not in str(error.value)


def test_a_python_whose_sqlite_cannot_search_is_named(tmp_path, monkeypatch):
    connect = sqlite3.connect

    class Without(sqlite3.Connection):
        def execute(self, statement, *parameters):
            if "fts5" in statement:
                raise sqlite3.OperationalError("no such module: fts5")
            return super().execute(statement, *parameters)

    monkeypatch.setattr(sqlite3, "connect", lambda *arguments: connect(*arguments, factory=Without))
    history.require_fts5.cache_clear()
    with pytest.raises(UserError, match=r"cannot search documents \(no such module: fts5\); use a Python whose SQLite"):
        DocumentStore(tmp_path / "documents.db")
    history.require_fts5.cache_clear()


def test_ten_thousand_documents_are_searched_in_milliseconds(tmp_path):
    store = DocumentStore(tmp_path / "documents.db")
    store.seed(
        Document(f"P-{number}", f"{word} items of kind k{number} within {number % 90 + 1} days are eligible.")
        for number in range(1, 10_001)
        for word in [("damaged", "late", "wrong", "unwanted", "defective")[number % 5]]
    )
    reader = DocumentStore(store.path)
    assert found(reader, "damaged k77", 1) == ["P-77"]  # reads the file
    started = time.perf_counter()
    for _ in range(20):
        assert found(reader, "damaged", 1) == ["P-5"]
    assert (time.perf_counter() - started) / 20 < 0.05
