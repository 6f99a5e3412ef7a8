"""What is in the file of a document store: its tables, and the history in them, read with every checksum compared."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from twinloop.common.errors import UserError
from twinloop.domains.domain import Document

BUSY_S = 20.0
"""How long a process waits for another one's transaction, which takes milliseconds."""

EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()

SCHEMA = (
    """CREATE TABLE versions (
        number INTEGER PRIMARY KEY,
        document_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        text TEXT NOT NULL,
        recorded_at TEXT NOT NULL,
        checksum TEXT NOT NULL,
        UNIQUE (document_id, version)
    )""",
    """CREATE TABLE newest (
        place TEXT NOT NULL,
        document_id TEXT NOT NULL,
        number INTEGER NOT NULL UNIQUE,
        PRIMARY KEY (place, document_id)
    ) WITHOUT ROWID""",
    "CREATE TABLE head (versions INTEGER NOT NULL, digest TEXT NOT NULL)",
    "CREATE VIRTUAL TABLE search USING fts5 (text, tokenize = 'porter unicode61')",
    "CREATE TRIGGER no_update BEFORE UPDATE ON versions BEGIN SELECT RAISE(ABORT, 'a version is never changed'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON versions BEGIN SELECT RAISE(ABORT, 'a version is never removed'); END",
)
# `place` orders ids as people do: P-7 before P-12. `search` holds the newest version of each document, by its number.

COLUMNS = "v.number, v.document_id, v.version, v.text, v.recorded_at, v.checksum"
NEWEST = f"SELECT {COLUMNS} FROM newest JOIN versions v ON v.number = newest.number"
FOUND = (
    f"SELECT {COLUMNS} FROM search JOIN versions v ON v.number = search.rowid "
    "JOIN newest ON newest.number = v.number WHERE search MATCH ? ORDER BY search.rank, newest.place LIMIT ?"
)


@dataclass(frozen=True)
class Recorded:
    """A version and when it was put."""

    document: Document
    recorded_at: str


def contents_digest(documents: Iterable[Document]) -> str:
    """Sha256 of ids and texts, whatever the order, versions and history: equal where the same is found."""
    texts = sorted((each.document_id, each.text.strip()) for each in documents)
    return hashlib.sha256("".join(json.dumps(text) + "\n" for text in texts).encode()).hexdigest()


class IntegrityError(Exception):
    """The store does not hold what was once written there."""


@dataclass
class Seen:
    """How far the history was read and verified."""

    versions: int = 0
    hash: Any = field(default_factory=hashlib.sha256)

    def add(self, document_id: str, version: int, text: str) -> None:
        self.versions += 1
        self.hash.update(json.dumps([document_id, version, text]).encode() + b"\n")

    @property
    def digest(self) -> str:
        return str(self.hash.hexdigest())

    def copy(self) -> Seen:
        return Seen(self.versions, self.hash.copy())


def insert(connection: sqlite3.Connection, seen: Seen, document: Document) -> None:
    """Add a version behind the last one, and make it the one that is found."""
    number, recorded_at = seen.versions + 1, datetime.now(UTC).isoformat(timespec="seconds")
    document_id, version, text = document.document_id, document.version, document.text
    row = (number, document_id, version, text, recorded_at)
    connection.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", (*row, _checksum(row)))
    place = re.sub(r"[0-9]+", lambda digits: digits[0].zfill(20), document_id)
    replaced = connection.execute("SELECT number FROM newest WHERE place = ? AND document_id = ?", (place, document_id))
    connection.executemany("DELETE FROM search WHERE rowid = ?", replaced.fetchall())
    connection.execute("INSERT OR REPLACE INTO newest VALUES (?, ?, ?)", (place, document_id, number))
    connection.execute("INSERT INTO search (rowid, text) VALUES (?, ?)", (number, text))
    seen.add(document_id, version, text)


def verified(row: tuple[Any, ...]) -> Recorded:
    """A row of `versions`. Raises IntegrityError where it is not what was written."""
    *content, checksum = row
    if checksum != _checksum(content):
        raise IntegrityError(f"version {row[2]} of document {row[1]!r} is not what was put")
    _, document_id, version, text, recorded_at = content
    return Recorded(Document(document_id, text, version), recorded_at)


def _checksum(content: Iterable[object]) -> str:
    return hashlib.sha256(json.dumps([*content]).encode()).hexdigest()


def catch_up(connection: sqlite3.Connection, seen: Seen) -> None:
    """Verify the versions that were added since. Inside of a transaction."""
    versions, digest = connection.execute("SELECT versions, digest FROM head").fetchone()
    if versions != seen.versions:
        added = f"SELECT {COLUMNS} FROM versions v WHERE number > ? ORDER BY number"
        for row in connection.execute(added, (seen.versions,)):
            document = verified(row).document
            seen.add(document.document_id, document.version, document.text)
    if (versions, digest) != (seen.versions, seen.digest):
        raise IntegrityError("its versions are not those that its digest was made of")


def verify(connection: sqlite3.Connection, seen: Seen) -> None:
    """All of the file: its pages, every version, and that the index holds each document's newest one."""
    [[found]] = connection.execute("PRAGMA quick_check(1)").fetchall()
    if found != "ok":
        raise IntegrityError(" ".join(found.split()))
    catch_up(connection, seen)
    connection.execute("INSERT INTO search (search) VALUES ('integrity-check')")
    newest = "SELECT document_id, max(number) FROM versions GROUP BY document_id"
    listed = "SELECT document_id, number FROM newest"
    indexed = "SELECT v.document_id, v.number FROM search s JOIN versions v ON v.number = s.rowid AND v.text = s.text"
    for index in (listed, indexed):
        for less in (f"{newest} EXCEPT {index}", f"{index} EXCEPT {newest}"):
            if connection.execute(f"{less} LIMIT 1").fetchone():
                raise IntegrityError("its index is not that of its documents")


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """mode: "ro", "rw", or "rwc", which makes a file that is missing."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    # isolation_level None: transactions begin where this module begins them.
    return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)


@contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction, as the only one that writes."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # SQLite itself rolls back on a full disk
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def make_tables(connection: sqlite3.Connection) -> None:
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT INTO head VALUES (0, ?)", (EMPTY_DIGEST,))


def has_tables(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'head'").fetchone() is not None


@cache
def require_fts5() -> None:
    """Raises UserError where this Python's SQLite has no full-text search."""
    try:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.execute("CREATE VIRTUAL TABLE search USING fts5 (text)")
    except sqlite3.OperationalError as error:
        raise UserError(
            f"sqlite3: the SQLite {sqlite3.sqlite_version} of this Python cannot search documents ({error}); "
            "use a Python whose SQLite is built with FTS5, as those of Linux distributions, python.org and conda are"
        ) from None
