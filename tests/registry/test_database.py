"""MLflow's database is whole or not there: also where a process died that was making or upgrading it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.registry.tracking import CodeVersion, Execution, Mlruns, Tracker
from twinloop.registry.versions import Registry, Snapshot

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "twinloop.registry.promotion"])

EXECUTION = Execution(recipe="returns", stage="sft", key="k1", settings={"epochs": 1}, code=CodeVersion("c0ffee"))
OLD_REVISION = "bf29a5ff90ea"
KILLED_AT = (1, 400, 1000, 1600)
"""Statements, of the 1668 that make the database."""
KILLED_UPGRADING_AT = (1, 200, 400)
NEVER = 10**9


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mlruns:
    """A project without a database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Mlruns(tmp_path / "mlruns")


@pytest.fixture(scope="session")
def old_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by an earlier MLflow, with a run and a registered model in it."""
    path = tmp_path_factory.mktemp("old") / "mlflow.db"
    process = processes.Process(target=_make_old, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return path


@pytest.fixture
def old(bare: Mlruns, old_database: Path) -> Mlruns:
    bare.root.mkdir()
    shutil.copy(old_database, bare.database)
    return bare


def _make_old(path: Path) -> None:
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    url = f"sqlite:///{path}"
    Base.metadata.create_all(create_engine(url))
    command.upgrade(_get_alembic_config(url), OLD_REVISION)
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage)"
            " VALUES (0, 'Default', '', 'active'), (1, 'old', 'file:///old', 'active')"
        )
        database.execute(
            "INSERT INTO runs"
            " (run_uuid, name, experiment_id, status, lifecycle_stage, artifact_uri, user_id, start_time)"
            " VALUES ('0ld', 'sft', 1, 'FINISHED', 'active', 'file:///old/0ld', 'somebody', 1)"
        )
        database.execute("INSERT INTO registered_models (name) VALUES ('returns')")
        database.commit()


def _die_at(statement: int) -> None:
    """kill -9 of this process after so many statements to a database."""
    from sqlalchemy import Engine, event

    done = count(1)

    @event.listens_for(Engine, "after_cursor_execute")
    def after(*_: object) -> None:
        if next(done) == statement:
            os.kill(os.getpid(), signal.SIGKILL)


def _open_by_mlflow_alone(database: Path, die_at: int) -> None:
    from mlflow.tracking import MlflowClient

    _die_at(die_at)
    assert MlflowClient(tracking_uri=f"sqlite:///{database}")


def _upgrade_by_mlflow_alone(database: Path, die_at: int) -> None:
    from mlflow.db import upgrade

    _die_at(die_at)
    assert upgrade.callback
    upgrade.callback(f"sqlite:///{database}")


def _open(root: Path, die_at: int) -> None:
    _die_at(die_at)
    assert Mlruns(root).client


def _open_on_a_full_disk(root: Path, bytes_left: int) -> None:
    """A write beyond that fails, which is reported in one line."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match=r"mlflow\.db: .*could not be (made|upgraded) .*disk") as error:
        _ = Mlruns(root).client
    assert "\n" not in str(error.value)


def ended(target: object, *arguments: object) -> int | None:
    process: BaseProcess = processes.Process(target=target, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join(120)
    return process.exitcode


def assert_works(root: Path) -> None:
    """What the next command does: an experiment, a run, and reading both."""
    mlruns = Mlruns(root)
    with Tracker(mlruns, EXECUTION) as run:
        run.log({"loss": 2.5})
    assert mlruns.client.get_run(run.run_id).data.metrics == {"loss": 2.5}
    assert Registry(mlruns, "none").snapshot() == Snapshot({}, {}, {})


def files(mlruns: Mlruns, ending: str) -> list[Path]:
    return sorted(mlruns.root.glob(f"mlflow.db{ending}"))


def revision(database: Path) -> str:
    with closing(sqlite3.connect(database)) as connection:
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


@pytest.mark.parametrize("statement", KILLED_AT)
def test_killed_while_it_makes_the_database(bare: Mlruns, statement: int) -> None:
    assert ended(_open, bare.root, statement) == -signal.SIGKILL
    assert not bare.database.exists()
    assert_works(bare.root)
    assert files(bare, "*") == [bare.database]


def test_killed_once_the_database_is_in_its_place(bare: Mlruns) -> None:
    bare.prepare_database()  # MLflow has not written its default experiment yet
    assert Registry(bare, "returns").snapshot() == Snapshot({}, {}, {})
    assert_works(bare.root)
    assert files(bare, "*") == [bare.database]


@pytest.mark.parametrize("statement", [900, 1000])
def test_what_mlflow_left_half_made_is_moved_aside_and_made_anew(
    bare: Mlruns, statement: int, caplog: pytest.LogCaptureFixture
) -> None:
    bare.root.mkdir()
    assert ended(_open_by_mlflow_alone, bare.database, statement) == -signal.SIGKILL
    shutil.copytree(bare.root, bare.root.with_name("copy"))
    assert ended(_open_by_mlflow_alone, bare.root.with_name("copy") / "mlflow.db", NEVER) == 1  # stuck for ever
    assert Registry(bare, "returns").snapshot() == Snapshot({}, {}, {})  # as `status` asks, before any run
    (kept,) = files(bare, ".half-made-*Z")
    assert f"{bare.database} was never finished: it is kept as {kept.name}" in caplog.text
    assert files(bare, "-*") == []
    assert_works(bare.root)


def test_an_empty_file_is_half_made(bare: Mlruns) -> None:
    bare.root.mkdir()
    bare.database.touch()
    assert_works(bare.root)
    assert len(files(bare, ".half-made-*")) == 1


def test_the_journal_of_a_lost_database_is_not_applied_to_the_new_one(bare: Mlruns) -> None:
    bare.root.mkdir()
    assert ended(_open_by_mlflow_alone, bare.database, 1000) == -signal.SIGKILL
    for end in ("-journal", "-wal", "-shm"):
        Path(f"{bare.database}{end}").write_bytes(b"left over")
    bare.database.unlink()
    assert_works(bare.root)
    assert [path.read_bytes() for path in files(bare, ".half-made-*")] == [b"left over"] * 3
    assert files(bare, "-*") == []


def test_the_database_of_an_earlier_mlflow_is_upgraded(old: Mlruns, caplog: pytest.LogCaptureFixture) -> None:
    before = old.database.read_bytes()
    assert old.client.get_run("0ld").info.status == "FINISHED"
    assert old.client.get_registered_model("returns")
    assert_works(old.root)
    (kept,) = files(old, ".before-upgrade-*")
    assert kept.read_bytes() == before
    assert f"{old.database} was upgraded for this version of MLflow; the old one is {kept.name}" in caplog.text
    assert Mlruns(old.root).client
    assert files(old, "*") == [old.database, kept]


@pytest.mark.parametrize("statement", KILLED_UPGRADING_AT)
def test_killed_while_it_upgrades_the_database(old: Mlruns, statement: int) -> None:
    assert ended(_open, old.root, statement) == -signal.SIGKILL
    assert revision(old.database) == OLD_REVISION
    assert old.client.get_run("0ld").info.status == "FINISHED"
    assert_works(old.root)
    assert files(old, ".new*") == []


@pytest.mark.parametrize("statement", [150, 300, 400])
def test_records_in_a_half_upgraded_database_are_not_moved(old: Mlruns, statement: int) -> None:
    """`mlflow db upgrade` works in place. Nothing can be done for its victim, but an empty one would hide it."""
    assert ended(_upgrade_by_mlflow_alone, old.database, statement) == -signal.SIGKILL
    assert revision(old.database)  # what was in the journal is applied now
    before = old.database.read_bytes()
    with pytest.raises(UserError, match=r"could not be upgraded .* and is as it was; .* restore a backup, or move it"):
        _ = old.client
    assert old.database.read_bytes() == before
    assert files(old, ".*") == []


def test_a_newer_mlflows_database_is_left_alone(mlruns: Mlruns) -> None:
    assert mlruns.experiment_id("returns")
    with closing(sqlite3.connect(mlruns.database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'f00d'")
        connection.commit()
    before = mlruns.database.read_bytes()
    with pytest.raises(UserError, match=r"another version of MLflow made it \(revision f00d; .*install that version"):
        _ = Mlruns(mlruns.root).client
    assert mlruns.database.read_bytes() == before
    assert files(mlruns, "*") == [mlruns.database]


def test_a_file_that_is_no_database_is_left_alone(bare: Mlruns) -> None:
    bare.root.mkdir()
    bare.database.write_text("my notes\n" * 1000)
    with pytest.raises(UserError, match=r"cannot be read as MLflow's database .*file is not a database"):
        Registry(bare, "returns").snapshot()
    assert files(bare, "*") == [bare.database]
    assert bare.database.read_text() == "my notes\n" * 1000


def test_an_upgraded_database_keeps_its_rights(old: Mlruns) -> None:
    old.database.chmod(0o600)
    assert old.client
    assert stat.S_IMODE(old.database.stat().st_mode) == 0o600


def test_a_database_that_another_process_writes_to_is_not_reported_as_corrupt(
    mlruns: Mlruns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinloop.registry.database.BUSY_FOR_S", 0.1)
    with closing(sqlite3.connect(mlruns.database)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"another process has held its lock for .*try again") as raised:
            _ = mlruns.client
    assert "restore" not in str(raised.value)


@pytest.mark.parametrize("linked", [False, True])
def test_a_database_that_a_process_has_open_is_not_replaced(old: Mlruns, tmp_path: Path, linked: bool) -> None:
    """An MLflow server that runs since before the upgrade would go on writing into the old file."""
    if linked:
        elsewhere = tmp_path / "another disk.db"
        old.database.rename(elsewhere)
        old.database.symlink_to(elsewhere)
    hold = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT 1 FROM runs'); print(); input()"
    command = [sys.executable, "-c", hold, str(old.database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline()
        with pytest.raises(UserError, match=rf"process {holder.pid} \(.*\) has it open; stop that"):
            _ = old.client
        holder.communicate(b"\n")
    assert old.client.get_run("0ld").info.status == "FINISHED"
    assert old.database.is_symlink() == linked


@pytest.mark.parametrize("bytes_left", [0, 4096, 100_000, 800_000])
def test_a_full_disk_is_reported_in_one_line_and_blocks_nothing(bare: Mlruns, bytes_left: int) -> None:
    assert ended(_open_on_a_full_disk, bare.root, bytes_left) == 0
    assert files(bare, "*") == []
    assert_works(bare.root)


def test_a_full_disk_stops_an_upgrade_and_leaves_the_old_database(old: Mlruns) -> None:
    assert ended(_open_on_a_full_disk, old.root, old.database.stat().st_size + 4096) == 0
    assert files(old, "*") == [old.database]
    assert old.client.get_run("0ld").info.status == "FINISHED"


def test_another_database_is_nobodys_to_make_here(
    bare: Mlruns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/theirs.db")
    assert bare.client
    assert not bare.database.exists()


@pytest.mark.slow
def test_killed_at_any_time_it_works_the_next_time(bare: Mlruns) -> None:
    kills = 25
    started = time.perf_counter()
    assert ended(_open, bare.root, NEVER) == 0
    window_s = time.perf_counter() - started
    for kill in range(kills):
        root = bare.root.with_name(f"killed{kill}")
        process = processes.Process(target=_open, args=(root, NEVER))
        process.start()
        time.sleep(window_s * kill / kills)
        process.kill()
        process.join()
        assert_works(root)
        assert not list(root.glob("mlflow.db.*"))
