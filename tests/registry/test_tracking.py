"""MLflow records what ran, on what, and how it ended, also when it ended badly."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import BaseModel

from twinloop.registry import tracking
from twinloop.registry.tracking import CodeVersion, Execution, Mlruns, Tracker, code_of_run, code_version, flatten

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "twinloop.registry.promotion"])


class Schedule(BaseModel):
    warmup_steps: int = 10
    decay: float = 0.1


class Settings(BaseModel):
    learning_rate: float = 3e-4
    schedule: Schedule = Schedule()
    windows: tuple[int, ...] = (7, 30)


EXECUTION = Execution(
    recipe="returns",
    stage="sft",
    key="k1",
    settings=Settings(),
    recipe_path=Path("recipes/returns.yaml"),
    parents={"pretrain": "k0"},
    dataset_digest="d41d8cd98f00b204e9800998ecf8427e.dir",
    code=CodeVersion("c0ffee", dirty=True),
)


def read(mlruns: Mlruns, run_id: str) -> Run:
    return mlruns.client.get_run(run_id)


def test_a_run_says_what_ran_on_what(mlruns: Mlruns) -> None:
    with Tracker(mlruns, EXECUTION) as tracker:
        tracker.log({"loss": 2.5, "tokens_per_s": 1000.0}, step=1)
        tracker.log({"loss": 2.0}, step=2)
    tracker.output("abc")
    run = read(mlruns, tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "learning_rate": "0.0003",
        "schedule.warmup_steps": "10",
        "schedule.decay": "0.1",
        "windows": "[7, 30]",
    }
    expected = {
        "twinloop.stage": "sft",
        "twinloop.key": "k1",
        "twinloop.parent.pretrain": "k0",
        "twinloop.recipe_path": "recipes/returns.yaml",
        "twinloop.commit": "c0ffee+dirty",
        "mlflow.source.git.commit": "c0ffee",
        "twinloop.manifest_digest": "abc",
    }
    assert expected.items() <= run.data.tags.items()
    assert run.data.metrics == {"loss": 2.0, "tokens_per_s": 1000.0}
    assert [m.value for m in mlruns.client.get_metric_history(tracker.run_id, "loss")] == [2.5, 2.0]


def test_a_run_is_found_by_its_dataset_and_tells_its_code(mlruns: Mlruns) -> None:
    with Tracker(mlruns, EXECUTION) as tracker:
        pass
    found = mlruns.client.search_runs(
        [mlruns.experiment_id("returns")], f"dataset.digest = '{EXECUTION.dataset_digest}'"
    )
    assert [run.info.run_id for run in found] == [tracker.run_id]
    assert code_of_run(mlruns, tracker.run_id) == EXECUTION.code
    assert code_of_run(mlruns, "0" * 32) is None


def test_metrics_are_written_in_few_batches(mlruns: Mlruns, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(mlruns, EXECUTION) as tracker:
        batches: list[int] = []
        log_batch = mlruns.client.log_batch

        def counted(run_id: str, metrics: list[Metric]) -> None:
            batches.append(len(metrics))
            log_batch(run_id, metrics=metrics)

        monkeypatch.setattr(mlruns.client, "log_batch", counted)
        for step in range(1250):
            tracker.log({"loss": 1 / (step + 1), "lr": 0.1}, step=step)
    assert batches == [1000, 1000, 500]
    assert len(mlruns.client.get_metric_history(tracker.run_id, "loss")) == 1250


def test_a_failed_stage_keeps_its_metrics(mlruns: Mlruns) -> None:
    tracker = Tracker(mlruns, EXECUTION)

    def fail() -> None:
        with tracker:
            tracker.log({"loss": 2.5, "broken": float("nan")}, step=1)
            raise ZeroDivisionError("one\ntwo")

    with pytest.raises(ZeroDivisionError):
        fail()
    run = read(mlruns, tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.metrics["loss"] == 2.5
    assert run.data.tags["twinloop.error"] == "ZeroDivisionError: one\ntwo"


def test_an_interrupted_stage_is_killed_not_failed(mlruns: Mlruns) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker(mlruns, EXECUTION) as tracker:
        raise KeyboardInterrupt
    assert read(mlruns, tracker.run_id).info.status == "KILLED"


def test_an_unreachable_database_delays_metrics_and_stops_nothing(
    mlruns: Mlruns, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(mlruns, EXECUTION, flush_every_s=0.0) as tracker:
        with monkeypatch.context() as patch:
            patch.setattr(mlruns.client, "log_batch", lambda *a, **k: 1 / 0)
            tracker.log({"loss": 2.5}, step=1)
        tracker.log({"loss": 2.0}, step=2)
    assert "metrics of sft wait" in caplog.text
    assert len(mlruns.client.get_metric_history(tracker.run_id, "loss")) == 2


@pytest.mark.parametrize(("failures", "status"), [(2, "FINISHED"), (4, "FAILED")])
def test_a_database_that_is_busy_at_the_end_is_waited_for(
    mlruns: Mlruns, monkeypatch: pytest.MonkeyPatch, failures: int, status: str
) -> None:
    monkeypatch.setattr(tracking, "RETRY_PAUSES_S", (0.0, 0.0))
    log_batch, tracker = mlruns.client.log_batch, Tracker(mlruns, EXECUTION)
    errors = [OSError("database is locked")] * failures

    def busy(run_id: str, metrics: list[Metric]) -> None:
        if errors:
            raise errors.pop()
        log_batch(run_id, metrics=metrics)

    def work() -> None:
        with tracker:
            tracker.log({"loss": 2.5})
            monkeypatch.setattr(mlruns.client, "log_batch", busy)

    if status == "FINISHED":
        work()
        assert read(mlruns, tracker.run_id).data.metrics == {"loss": 2.5}
    else:
        with pytest.raises(OSError, match="database is locked"):
            work()
    assert read(mlruns, tracker.run_id).info.status == status


def _work(root: Path, started: Event, finish: Event) -> None:
    with Tracker(Mlruns(root), EXECUTION) as tracker:
        tracker.log({"loss": 2.5}, step=1)
        tracker.flush()
        started.set()
        finish.wait(60)


def test_a_killed_process_leaves_a_run_that_the_next_start_marks(mlruns: Mlruns) -> None:
    started, finish = processes.Event(), processes.Event()
    process = processes.Process(target=_work, args=(mlruns.root, started, finish))
    process.start()
    assert started.wait(60)
    experiment = [mlruns.experiment_id("returns")]
    (run,) = mlruns.client.search_runs(experiment)
    with Tracker(mlruns, EXECUTION) as beside:  # the other is alive: not ours to end
        assert read(mlruns, run.info.run_id).info.status == "RUNNING"
    assert "twinloop.resumes" not in read(mlruns, beside.run_id).data.tags

    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    killed_ms = time.time() * 1000
    assert read(mlruns, run.info.run_id).info.status == "RUNNING"
    with Tracker(mlruns, EXECUTION) as next_start:
        pass
    ended = read(mlruns, run.info.run_id)
    assert ended.info.status == "KILLED"
    assert ended.info.end_time <= killed_ms  # when it was last seen alive, not when we looked
    assert ended.data.metrics == {"loss": 2.5}
    assert read(mlruns, next_start.run_id).data.tags["twinloop.resumes"] == run.info.run_id


def test_two_processes_may_start_on_a_bare_project_at_once(tmp_path: Path) -> None:
    started, finish = [processes.Event(), processes.Event()], processes.Event()
    both = [processes.Process(target=_work, args=(tmp_path / "mlruns", event, finish)) for event in started]
    for process in both:
        process.start()
    assert all(event.wait(60) for event in started)
    finish.set()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    mlruns = Mlruns(tmp_path / "mlruns")
    runs = mlruns.client.search_runs([mlruns.experiment_id("returns")])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def test_a_moved_project_keeps_its_runs_and_goes_on_in_its_new_place(mlruns: Mlruns, tmp_path: Path) -> None:
    with Tracker(mlruns, EXECUTION) as before:
        pass
    (tmp_path / "new").mkdir()
    moved = Mlruns(shutil.move(mlruns.root, tmp_path / "new" / "mlruns"))
    with Tracker(moved, EXECUTION) as after:
        pass
    assert read(moved, before.run_id).info.status == "FINISHED"
    assert str(moved.root) in read(moved, after.run_id).info.artifact_uri
    assert not mlruns.root.exists()


def test_a_deleted_experiment_stays_deleted_and_a_new_one_takes_over(mlruns: Mlruns) -> None:
    with Tracker(mlruns, EXECUTION) as before:
        pass
    experiment = mlruns.experiment_id("returns")
    mlruns.client.delete_experiment(experiment)
    with Tracker(mlruns, EXECUTION) as after:
        pass
    assert mlruns.experiment_id("returns") != experiment
    assert mlruns.client.get_experiment(experiment).lifecycle_stage == "deleted"
    assert mlruns.client.get_experiment(experiment).name.startswith("returns (deleted until ")
    assert read(mlruns, before.run_id).info.lifecycle_stage == "deleted"
    assert read(mlruns, after.run_id).info.lifecycle_stage == "active"


def test_settings_are_flattened() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": "1", "d": "None"}


def test_code_version_knows_uncommitted_changes(tmp_path: Path) -> None:
    assert code_version(tmp_path) == CodeVersion.parse(str(CodeVersion(None))) == CodeVersion(None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *arguments], check=True)
    (tmp_path / "untracked").write_text("1")
    clean = code_version(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine")
    assert code_version(tmp_path) == clean
    assert code_version(tmp_path, Path("mine.yaml")).dirty
    assert clean.commit
    assert str(clean) == clean.commit
    assert CodeVersion.parse(str(clean)) == clean
    (tmp_path / "a").write_text("2")
    assert str(code_version(tmp_path)) == f"{clean.commit}+dirty"
    assert CodeVersion.parse(f"{clean.commit}+dirty") == code_version(tmp_path)


def test_tracking_is_imported_without_mlflow() -> None:
    code = "import sys, registry.tracking; assert not {'mlflow', 'torch', 'dvc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
