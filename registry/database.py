"""A library's SQLite database in its place: whole, or not there at all.

MLflow and Prefect make and upgrade their databases by dozens of migrations. A process that dies among them, killed or
on a full disk, leaves a database between two revisions that the library can neither use nor migrate further: so are 176
of the 227 states that MLflow 3.17.2 passes through, and 3 of Prefect 3.8.8's 117. Therefore a database is made beside
its place and renamed into it, and an older one is upgraded on a copy.

A database at the library's newest revision is whole. One at another revision that holds no records was never finished.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from twinloop.common.errors import UserError, is_disk_full, one_line
from twinloop.common.files import fsync

log = logging.getLogger(__name__)

BUSY_FOR_S = 10.0
"""How long a lock of another process is waited for. A write of MLflow's takes milliseconds, a backup of SQLite's own
holds its lock page by page."""
LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
SIDE_FILES = ("-journal", "-wal", "-shm")
"""What SQLite keeps beside a database, and would apply to another one that takes its place."""
FILLED_BY_MIGRATIONS = {"alembic_version", "workspaces"}
MOVE_AWAY = "or move it away to start an empty one"


@dataclass(frozen=True)
class Migrations:
    """How a library makes its database."""

    library: str
    versions: Path
    """Alembic's scripts, one for each revision."""
    migrate: Callable[[Path], None]
    """Bring that file, which may be missing or older, to the newest revision, and close it."""


def prepare_database(database: Path, migrations: Migrations) -> None:
    """Make the database, or upgrade it; nothing where it is as the library needs it. Under a lock of the caller's.

    One that was never finished is moved away. Killed at any point, this leaves the old database or the new one, whole.
    Raises UserError, and leaves the database as it was, where that cannot be done.
    """
    from alembic.script import ScriptDirectory

    database = database.resolve()  # behind a link: its side files, and what other processes hold open, lie there
    scripts = ScriptDirectory(str(migrations.versions.parent), version_locations=[str(migrations.versions)])
    head = scripts.get_current_head()
    if not database.exists():
        _make(database, migrations)
        return
    try:
        revision, used = _revision(database), holds_records(database)
    except sqlite3.OperationalError as error:  # it may be as good as ever
        if is_locked(error):
            raise locked_error(database) from error
        remedy = "see to its permissions, or try again when no other process writes to it"
        raise UserError(f"{database}: cannot be opened ({error}); {remedy}") from error
    except sqlite3.DatabaseError as error:
        reason = f"cannot be read as {migrations.library}'s database ({error})"
        raise UserError(f"{database}: {reason}; restore it from a backup, {MOVE_AWAY}") from error
    if revision == head:
        return
    if used and revision not in {script.revision for script in scripts.walk_revisions()}:
        reason = f"another version of {migrations.library} made it (revision {revision}; this one knows up to {head})"
        raise UserError(f"{database}: {reason}; install that version, {MOVE_AWAY}")
    _refuse_if_open(database)
    if used:
        _upgrade(database, migrations)
    else:
        _make(database, migrations)


def holds_records(database: Path) -> bool:
    """Whether anything was written into it beyond what its migrations write. Raises sqlite3.Error."""
    with closing(_open(database)) as connection:
        tables = _tables(connection) - FILLED_BY_MIGRATIONS
        return any(connection.execute(f'SELECT 1 FROM "{table}" LIMIT 1').fetchone() for table in tables)


def is_locked(error: BaseException) -> bool:
    """Whether SQLite has waited in vain for a lock of another process."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in LOCKED


def locked_error(database: Path) -> UserError:
    reason = f"another process has held its lock for {BUSY_FOR_S:.0f} s"
    return UserError(f"{database}: {reason}; wait for its end, or end it, and try again")


def _make(database: Path, migrations: Migrations) -> None:
    try:
        new = _migrated(database, migrations)
    except Exception as error:
        what = f"{database}: {migrations.library}'s database could not be made"
        if is_disk_full(error):
            raise UserError(f"{what}, the disk is full; free some space and run it again") from error
        raise UserError(f"{what} ({one_line(error)}); remove the cause and run it again") from error
    if kept := _move_away(database):
        log.warning("%s was never finished: it is kept as %s, and a new one was made", database, kept.name)
    _publish(new, database)


def _upgrade(database: Path, migrations: Migrations) -> None:
    try:
        new = _migrated(database, migrations, start=database)
    except Exception as error:
        raise UserError(
            f"{database}: could not be upgraded for this version of {migrations.library} ({one_line(error)}) and "
            f"is as it was; if the disk is full, free some space; if an upgrade was cut off before, restore a backup, "
            f"{MOVE_AWAY}"
        ) from error
    kept = _kept_name(database, "before-upgrade")
    try:
        kept.hardlink_to(database)
    except OSError:  # a file system without links
        shutil.copy2(database, kept)
    _publish(new, database)
    log.warning("%s was upgraded for this version of %s; the old one is %s", database, migrations.library, kept.name)


def _migrated(database: Path, migrations: Migrations, start: Path | None = None) -> Path:
    """A file beside `database` at the newest revision, made anew or from a copy of `start`. Raises what a migration
    raises: anything."""
    new = database.with_name(f"{database.name}.new")
    _remove(new)  # of a process that was killed
    try:
        if start:
            new.touch()
            shutil.copymode(start, new)
            with closing(_open(start)) as source, closing(sqlite3.connect(new)) as copy:
                source.backup(copy)
        migrations.migrate(new)
        with closing(sqlite3.connect(new)) as connection:
            # Everything in the one file that will be renamed. Refused while another connection is open.
            connection.execute("PRAGMA journal_mode = DELETE")
        fsync(new)
    except Exception:
        _remove(new)
        raise
    return new


def _publish(new: Path, database: Path) -> None:
    new.rename(database)
    fsync(database.parent)


def _move_away(database: Path) -> Path | None:
    """Where the database lies now; None if there was none. Its side files go with it, also those of a lost one."""
    found, kept = database.exists(), _kept_name(database, "half-made")
    for end in ("", *SIDE_FILES):
        with suppress(FileNotFoundError):
            Path(f"{database}{end}").rename(f"{kept}{end}")
    return kept if found else None


def _kept_name(database: Path, why: str) -> Path:
    return database.with_name(f"{database.name}.{why}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")


def _remove(database: Path) -> None:
    for end in ("", *SIDE_FILES):
        Path(f"{database}{end}").unlink(missing_ok=True)


def _refuse_if_open(database: Path) -> None:
    """A process that holds the file open would go on writing into the one that was moved. Raises UserError."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or another user's
            if any(file.path == str(database) for file in process.open_files()):
                raise UserError(
                    f"{database}: must be made anew or upgraded, and process {process.pid} ({process.name()}) has it "
                    "open; stop that (`make down` stops the services) and try again"
                )


def _revision(database: Path) -> str | None:
    with closing(_open(database)) as connection:
        if "alembic_version" not in _tables(connection):
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else None


def _tables(connection: sqlite3.Connection) -> set[str]:
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return {name for (name,) in names}


def _open(database: Path) -> sqlite3.Connection:
    """Not read-only: what a killed writer left in the side files is to be applied, and they are to go."""
    return sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=BUSY_FOR_S)
