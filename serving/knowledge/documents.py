"""Versioned documents in one SQLite file that any process may read while another one writes it.

A version is never changed and never removed: the table takes new rows only. Each row has a checksum, which is compared
whenever the row is read, and the digest over all rows names the exact documents that an answer was given under. All of
it, and the full-text index beside it, is checked when a file is opened, and again when the file was replaced.

SQLite's write-ahead log gives readers one moment of the store while a writer commits, and its transactions keep it
whole under kill -9 and on a full disk. It needs locks and shared memory: the file must lie on a local disk. To open it,
also only to read, needs the right to write the file and its folder.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from twinloop.common.errors import UserError, is_disk_full, one_line
from twinloop.common.files import has_space
from twinloop.domains.documents import is_text, unusable
from twinloop.domains.domain import Document
from twinloop.serving.knowledge.history import (
    BUSY_S,
    COLUMNS,
    EMPTY_DIGEST,
    FOUND,
    NEWEST,
    IntegrityError,
    Recorded,
    Seen,
    catch_up,
    connect,
    contents_digest,
    has_tables,
    insert,
    make_tables,
    require_fts5,
    verified,
    verify,
    writing,
)
from twinloop.serving.knowledge.imports import Imported, import_all
from twinloop.serving.knowledge.query import match_expression

Check = Callable[[str, str], str | None]
"""(document_id, text) -> why the document may not enter, or None: `Domain.check_document`."""

Documents = list[Document]


@dataclass(frozen=True)
class SearchResult:
    """Documents, those of a search best first, and the digest of the store in that moment."""

    documents: Documents
    digest: str


class DocumentError(UserError):
    """A document that the store does not accept: its id, its text, or the domain's own check."""


class DocumentStoreError(UserError):
    """The store cannot be read or written. `reason` names no place on this machine."""

    def __init__(self, path: Path, reason: str, advice: str):
        super().__init__(f"{path}: {reason}; {advice}")
        self.reason = f"the documents: {reason}"


class DocumentStore:
    """The documents in the file at `path`. Safe for many threads and many processes at once.

    Every method sees what other processes have put before it was called. A missing file is an empty store. Methods
    raise DocumentStoreError where the file cannot be read or written, or is corrupt.
    """

    def __init__(self, path: str | os.PathLike[str], check: Check | None = None):
        require_fts5()
        self.path = Path(path)
        self._check = check
        self._lock = threading.RLock()
        self._reader: sqlite3.Connection | None = None
        self._stamp: tuple[int, ...] = ()
        self._seen = Seen()
        self._contents = ("", "")

    def put(self, document_id: str, text: str) -> Document:
        """Make a text the document's newest version and return it; it is on the disk when this returns.

        The newest text keeps its version. Raises DocumentError for a document that may not enter, and
        DocumentStoreError, with the store as it was, where the disk does not take it.
        """
        document_id, text = self._checked(document_id, text)
        with self._writing() as (connection, seen):
            row = connection.execute(
                f"SELECT {COLUMNS} FROM versions v WHERE document_id = ? ORDER BY version DESC LIMIT 1", (document_id,)
            ).fetchone()
            newest = verified(row).document if row else None
            if newest is not None and newest.text == text:
                return newest
            document = Document(document_id, text, newest.version + 1 if newest else 1)
            insert(connection, seen, document)
            return document

    def seed(self, documents: Iterable[Document]) -> int:
        """Fill a store that is still empty, all or nothing, and return with how many documents.

        A store that holds anything is left as it is. Raises like `put`.
        """
        done = self._import(documents, only_if_empty=True)
        return len(done.put) if done else 0

    def import_documents(self, documents: Iterable[Document]) -> Imported:
        """Put what has changed in the data since its last import, all or nothing; what an administrator has put since
        is kept. Raises like `put`."""
        done = self._import(documents, only_if_empty=False)
        assert done is not None
        return done

    def _import(self, documents: Iterable[Document], *, only_if_empty: bool) -> Imported | None:
        new = [Document(*self._checked(each.document_id, each.text)) for each in documents]
        if len({each.document_id for each in new}) != len(new):
            raise UserError(f"{self.path}: two of the documents to import have the same id; keep one of each")
        with self._writing() as (connection, seen):
            if only_if_empty and seen.versions:
                return None

            def put(document: Document) -> int:
                insert(connection, seen, document)
                return seen.versions

            return import_all(connection, new, put)

    def list(self) -> Documents:
        """The newest version of every document, ordered by id, the numbers in it by their value."""
        return self.list_with_digest().documents

    def list_with_digest(self) -> SearchResult:
        """`list` and `digest` of one moment."""
        with self._reading() as connection:
            if connection is None:
                return SearchResult([], EMPTY_DIGEST)
            rows = connection.execute(f"{NEWEST} ORDER BY newest.place, newest.document_id")
            return SearchResult([verified(row).document for row in rows], self._seen.digest)

    def count(self) -> int:
        """How many documents there are."""
        with self._reading() as connection:
            return 0 if connection is None else int(connection.execute("SELECT count(*) FROM newest").fetchone()[0])

    def history(self, document_id: str) -> Sequence[Recorded]:
        """Every version of a document, oldest first; empty for a document that is not there."""
        with self._reading() as connection:
            if connection is None or not is_text(document_id):
                return []
            query = f"SELECT {COLUMNS} FROM versions v WHERE document_id = ? ORDER BY version"
            return [verified(row) for row in connection.execute(query, (document_id,))]

    def find(self, query: str, limit: int) -> SearchResult:
        """The documents that fit the query best by BM25, and the digest of the store in that moment.

        query: words, of which a document has one or more; no syntax. A word is what stands between spaces or signs, so
        text without spaces between words (Chinese, Japanese, Thai) is found by whole runs of characters only. Documents
        without any of them fill the places that are left, in the order of `list`: a prompt holds as many in service as
        in training.
        """
        with self._reading() as connection:
            if connection is None:
                return SearchResult([], EMPTY_DIGEST)
            words = match_expression(query)
            rows = connection.execute(FOUND, (words, limit)).fetchall() if words else []
            if len(rows) < limit:
                numbers = {row[0] for row in rows}
                others = connection.execute(f"{NEWEST} ORDER BY newest.place, newest.document_id LIMIT ?", (limit,))
                rows += [row for row in others if row[0] not in numbers][: limit - len(rows)]
            return SearchResult([verified(row).document for row in rows], self._seen.digest)

    def digest(self) -> str:
        """Sha256 over every version ever put, in order: equal digests mean equal documents and equal histories."""
        with self._reading() as connection:
            return EMPTY_DIGEST if connection is None else self._seen.digest

    def contents(self) -> str:
        """`contents_digest` of the documents that are found now."""
        listed = self.list_with_digest() if self._contents[0] != self.digest() else None
        if listed is not None:
            self._contents = (listed.digest, contents_digest(listed.documents))
        return self._contents[1]

    def close(self) -> None:
        """Give the file back, in one piece where nobody else has it open; the next call opens it again."""
        with self._lock:
            self._close()
            with suppress(sqlite3.Error), closing(connect(self.path, "rw")) as connection:
                has_tables(connection)  # the last one that writes and leaves puts the log into the file

    # --- reading and writing ------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """One moment of the store, verified; None where nothing was ever put."""
        with self._lock, self._translated("read"):
            connection = self._begin()
            try:
                yield connection
            finally:
                if connection is not None:
                    connection.execute("ROLLBACK")

    def _begin(self) -> sqlite3.Connection | None:
        """A connection that stays at this moment until it is rolled back, and all that was added is verified."""
        connection = self._open()
        if connection is None:
            return None
        connection.execute("BEGIN")
        try:
            catch_up(connection, self._seen)
        except IntegrityError:  # or another history, which SQLite's own restore has put there: looked at as a whole
            self._close()
            if (connection := self._open()) is None:
                return None
            connection.execute("BEGIN")
            catch_up(connection, self._seen)
        return connection

    @contextmanager
    def _writing(self) -> Iterator[tuple[sqlite3.Connection, Seen]]:
        """The store while nobody else writes; what was done inside is on the disk afterwards, or undone."""
        with self._translated("written"):
            self._make()
            with self._reading():
                seen = self._seen.copy()
            with closing(connect(self.path, "rw")) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                with writing(connection):
                    catch_up(connection, seen)
                    before = seen.versions
                    yield connection, seen
                    if seen.versions == before:
                        return
                    connection.execute("UPDATE head SET versions = ?, digest = ?", (seen.versions, seen.digest))

    def _make(self) -> None:
        """Make the file with its tables, unless it has them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(connect(self.path, "rwc")) as connection:
            if has_tables(connection):
                return
            deadline = time.monotonic() + BUSY_S
            while True:
                try:
                    connection.execute("PRAGMA journal_mode = WAL")
                    break
                except sqlite3.OperationalError as error:  # SQLite does not wait here for another process
                    if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
            with writing(connection):
                if not has_tables(connection):
                    make_tables(connection)

    def _open(self) -> sqlite3.Connection | None:
        """A connection to the file as it is now, all of which was verified; None where there is no store yet.

        It is read-only: where somebody puts a restored file in the place of this one, what a writing connection does
        when it is closed could change that file.
        """
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._close()
            return None
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._reader is not None and stamp == self._stamp:
            return self._reader
        self._close()
        with closing(connect(self.path, "rw")) as connection:
            if not has_tables(connection):
                return None
            seen = Seen()
            with writing(connection):
                verify(connection, seen)
            reader = connect(self.path, "ro")
            has_tables(reader)  # before the other one is closed, which would empty the log and change the file
        self._reader, self._seen, self._stamp = reader, seen, stamp
        return reader

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader, self._seen, self._stamp = None, Seen(), ()

    @contextmanager
    def _translated(self, done: str) -> Iterator[None]:
        """What goes wrong in SQLite or on the disk, as the one error of this module. What is read next is verified."""
        try:
            yield
        except IntegrityError as error:
            with self._lock:
                self._close()
            raise self._integrity_error(str(error)) from None
        except (sqlite3.Error, OSError) as error:
            with self._lock:
                self._close()
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or isinstance(error, sqlite3.IntegrityError):
                raise self._integrity_error(one_line(error)) from None
            reason = f"cannot be {done} ({self._why(error)})"
            if done == "written":
                advice = "free some space or see to its permissions, then try again"
                raise DocumentStoreError(self.path, f"{reason}, nothing was changed", advice) from None
            raise DocumentStoreError(self.path, reason, "see to its permissions and its disk") from None

    def _integrity_error(self, reason: str) -> DocumentStoreError:
        advice = (
            "restore a backup into it, or move it and its -wal file away to start with the documents of the data set"
        )
        return DocumentStoreError(self.path, f"is corrupt ({reason})", advice)

    def _why(self, error: Exception) -> str:
        """In words: SQLite's own message for a full or read-only disk names only what it was doing."""
        place = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            return os.strerror(errno.EROFS)
        return "the disk is full" if is_disk_full(error) or not has_space(self.path) else one_line(error)

    def _checked(self, document_id: str, text: str) -> tuple[str, str]:
        """Id and text, without white space around the text. Raises DocumentError."""
        text = text.strip()
        reason = unusable(document_id, text) or (self._check(document_id, text) if self._check else None)
        if reason is not None:
            raise DocumentError(f"document {document_id!r}: {reason}")
        return document_id, text
