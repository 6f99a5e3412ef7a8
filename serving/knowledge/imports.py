"""Which versions of a document store came from the data, so that a later import knows what an administrator changed.

A document that nobody has put since its last import takes the data's new text. One that an administrator has put since
keeps that text, whatever the data says now: it is reported, and the administrator decides.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twinloop.domains.domain import Document
from twinloop.serving.knowledge.history import COLUMNS, NEWEST, verified

TABLE = """CREATE TABLE IF NOT EXISTS imported (
    document_id TEXT PRIMARY KEY,
    number INTEGER NOT NULL
) WITHOUT ROWID"""
"""The row of `versions` that holds what the data said of a document when it was last imported."""


@dataclass(frozen=True)
class Imported:
    """What an import did. put: new versions. kept: documents of which the data has another text than an administrator
    put. left: documents of earlier data that the data now lacks, and which are still found."""

    put: Sequence[Document]
    kept: Sequence[Document]
    left: Sequence[Document]

    def __str__(self) -> str:
        words = [f"{len(self.put)} new: {_names(self.put)}" if self.put else "none changed"]
        if self.kept:
            words.append(f"{_names(self.kept)} kept as an administrator put it, though the data says otherwise")
        if self.left:
            words.append(f"{_names(self.left)} no longer in the data, and still found")
        return "; ".join(words)


def _names(documents: Sequence[Document], most: int = 3) -> str:
    names = ", ".join(each.document_id for each in documents[:most])
    return names + (f" and {len(documents) - most} more" if len(documents) > most else "")


def import_all(
    connection: sqlite3.Connection, documents: Sequence[Document], put: Callable[[Document], int]
) -> Imported:
    """Import documents, one of each id. In a transaction. put: adds a version, and returns its number."""
    _prepare(connection)
    last = dict(connection.execute("SELECT document_id, number FROM imported").fetchall())
    now = {row[1]: verified(row).document for row in connection.execute(NEWEST)}
    numbers = {row[1]: row[0] for row in connection.execute(NEWEST)}
    new, kept = list[Document](), list[Document]()
    for document in documents:
        name = document.document_id
        found = now.get(name)
        if found is not None and found.text == document.text:
            number = numbers[name]
        elif found is None or numbers[name] == last.get(name):
            made = Document(name, document.text, found.version + 1 if found else 1)
            number = put(made)
            new.append(made)
        else:  # an administrator has put it since
            if _text(connection, last.get(name)) != document.text:
                kept.append(found)
            continue
        connection.execute("INSERT OR REPLACE INTO imported VALUES (?, ?)", (name, number))
    names = {document.document_id for document in documents}
    left = [now[name] for name, number in last.items() if name not in names and numbers.get(name) == number]
    return Imported(new, kept, left)


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the table where an earlier release, which only imported into an empty store, has made the file."""
    known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'imported'").fetchone()
    connection.execute(TABLE)
    if not known:
        connection.execute("INSERT INTO imported SELECT document_id, number FROM versions WHERE version = 1")


def _text(connection: sqlite3.Connection, number: int | None) -> str | None:
    row = connection.execute(f"SELECT {COLUMNS} FROM versions v WHERE number = ?", (number,)).fetchone()
    return verified(row).document.text if row else None
