"""Prefect's database is whole or not there, and a server that starts finds it so."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import provide_database_interface, temporary_database_config
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_HOME, temporary_settings
from sqlalchemy.exc import OperationalError

from twinloop.flows.prefect_database import prepare_prefect_database
from twinloop.flows.server import embedded_server, wait_until_ready

MIGRATION_IN_TWO_PARTS = "e757138e954a"
"""The revision before one that commits in the middle (Prefect 3.8.8 has three such)."""
FIRST_PART = "ALTER TABLE flow_run ADD COLUMN state_timestamp DATETIME"
OLD_REVISION = "bbca16f6f218"

DIE = """
import os, signal, sys
from itertools import count
from sqlalchemy import Engine, event
from twinloop.flows.prefect_database import prepare_prefect_database
done = count(1)

@event.listens_for(Engine, "after_cursor_execute")
def after(*_):
    if next(done) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

prepare_prefect_database()
"""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Path]:
    """Where Prefect has its database."""
    with temporary_settings({PREFECT_HOME: tmp_path}):
        yield tmp_path / "prefect.db"


def upgrade_by_prefect_alone(database: Path, revision: str = "head") -> None:
    from prefect.server.database.alembic_commands import alembic_upgrade
    from prefect.utilities.asyncutils import run_sync_in_worker_thread

    async def upgrade() -> None:
        await run_sync_in_worker_thread(alembic_upgrade, revision)

    config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{database}")
    with temporary_database_config(config):
        asyncio.run(upgrade())


def execute(database: Path, statement: str) -> list[tuple[str]]:
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute(statement).fetchall()
        connection.commit()
    return rows


def newest() -> str:
    from alembic.script import ScriptDirectory

    versions = str(provide_database_interface().orm.versions_dir)
    return str(ScriptDirectory(versions, version_locations=[versions]).get_current_head())


def revision(database: Path) -> str:
    return execute(database, "SELECT version_num FROM alembic_version")[0][0]


def files(database: Path, ending: str) -> list[Path]:
    return sorted(database.parent.glob(f"{database.name}{ending}"))


@pytest.mark.slow
def test_what_prefect_left_half_made_is_moved_aside_and_made_anew(database: Path) -> None:
    upgrade_by_prefect_alone(database, MIGRATION_IN_TWO_PARTS)
    execute(database, FIRST_PART)
    before = database.read_bytes()
    with pytest.raises(OperationalError, match="duplicate column"):  # stuck for ever
        upgrade_by_prefect_alone(database)
    prepare_prefect_database()
    assert revision(database) == newest()
    (kept,) = files(database, ".half-made-*")
    assert kept.read_bytes() == before
    assert files(database, ".new*") == []


@pytest.mark.slow
def test_the_database_of_an_earlier_prefect_is_upgraded(database: Path) -> None:
    upgrade_by_prefect_alone(database, OLD_REVISION)
    execute(database, "INSERT INTO flow (id, name) VALUES ('f1', 'lifecycle')")
    before = database.read_bytes()
    prepare_prefect_database()
    assert revision(database) == newest()
    assert execute(database, "SELECT name FROM flow") == [("lifecycle",)]
    (kept,) = files(database, ".before-upgrade-*")
    assert kept.read_bytes() == before
    written = database.stat().st_mtime_ns
    prepare_prefect_database()
    assert database.stat().st_mtime_ns == written


def test_a_database_of_ones_own_is_prefects_to_make(database: Path) -> None:
    theirs = f"sqlite+aiosqlite:///{database.with_name('theirs.db')}"
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: theirs}):
        prepare_prefect_database()
    assert files(database, "*") == []
    assert not database.with_name("theirs.db").exists()


@pytest.mark.slow
def test_killed_while_it_makes_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    for statement in (1, 3464, 5160, 7731, 8740):
        killed = subprocess.run([sys.executable, "-c", DIE, str(statement)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "prefect.db").exists()
    with embedded_server(tmp_path):
        wait_until_ready(tmp_path)
    assert [path.name for path in files(tmp_path / "prefect.db", ".*")] == ["prefect.db.lock"]
