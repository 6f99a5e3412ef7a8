"""Prefect's own database, made or upgraded before its server opens it: see `twinloop.registry.database`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from filelock import FileLock

from twinloop.registry.database import Migrations, prepare_database


def prepare_prefect_database() -> None:
    """Where Prefect's settings name another than that of PREFECT_HOME, nothing is done: Prefect makes that one.

    Imports Prefect's server (2 s). Raises UserError where the database can be neither used, upgraded nor made.
    """
    from prefect.server.database import provide_database_interface
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_HOME

    database = PREFECT_HOME.value() / "prefect.db"
    if PREFECT_API_DATABASE_CONNECTION_URL.value() != f"sqlite+aiosqlite:///{database}":
        return
    versions = provide_database_interface().orm.versions_dir
    with FileLock(f"{database}.lock"):
        prepare_database(database, Migrations("Prefect", versions, _migrate))


def _migrate(database: Path) -> None:
    from prefect.server.database.configurations import AioSqliteConfiguration
    from prefect.server.database.dependencies import provide_database_interface, temporary_database_config

    config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{database}")
    with temporary_database_config(config):
        asyncio.run(provide_database_interface().create_db())  # its connections end with the loop
