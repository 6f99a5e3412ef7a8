"""MLflow's own database, made or upgraded before anything opens it: see `twinloop.registry.database`."""

from __future__ import annotations

import logging
from pathlib import Path

from twinloop.registry.database import Migrations, prepare_database


def prepare_mlflow_database(database: Path) -> None:
    """Under a lock of the caller's. Raises UserError where the database can be neither used, upgraded nor made."""
    import mlflow.store.db_migrations as migrations

    quiet_mlflow()
    versions = Path(migrations.__path__[0]) / "versions"
    prepare_database(database, Migrations("MLflow", versions, _migrate))


def quiet_mlflow() -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # at INFO, its migrations would be in the display
    # At INFO the same, and at ERROR a traceback of each exception that it also raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each retry


def _migrate(database: Path) -> None:
    """What `mlflow db upgrade` does (3.17.2); that leaves its connections open."""
    from mlflow.store.db.utils import _initialize_tables, _is_empty_database, _upgrade_db
    from sqlalchemy import URL, NullPool, create_engine

    engine = create_engine(URL.create("sqlite", database=str(database)), poolclass=NullPool)
    if _is_empty_database(engine):
        _initialize_tables(engine)
    else:
        _upgrade_db(engine)
