"""The file of the documents: several processes, integrity, backups, and disks that fail."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from stored import DAMAGED, LATE, UNWANTED, found, ids, put_in_another_process

from twinloop.common.errors import UserError
from twinloop.domains.domain import Document
from twinloop.serving.knowledge import history
from twinloop.serving.knowledge.documents import DocumentStore, DocumentStoreError

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
