"""The run of a lifecycle, with those of its stages nested under it."""

from __future__ import annotations

import getpass
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from twinloop.registry.liveness import alive_lock
from twinloop.registry.tracking import CodeVersion, Execution, Mlruns, Tracker
from twinloop.report.gather import POINTS, curves_of

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store"])

LIFECYCLE = Execution(
    recipe="returns",
    stage="lifecycle",
    key="lifecycle",
    name="returns 2026-11-26 04:10",
    settings={"base": {"depth": 4}},
    recipe_path=Path("recipes/returns.yaml"),
    code=CodeVersion("c0ffee"),
)
STAGE = Execution(recipe="returns", stage="sft", key="k1", settings={}, code=CodeVersion("c0ffee"))


def test_stages_are_nested_and_the_code_is_in_mlflows_own_fields(mlruns: Mlruns) -> None:
    with Tracker(mlruns, LIFECYCLE) as whole:
        whole.dataset("d41d8.dir")
        with Tracker(mlruns, replace(STAGE, lifecycle=whole.run_id)) as part:
            pass
    run = mlruns.client.get_run(whole.run_id)
    assert (run.info.run_name, run.info.status) == ("returns 2026-11-26 04:10", "FINISHED")
    assert run.data.params == {"base.depth": "4"}
    assert {
        "mlflow.source.name": "recipes/returns.yaml",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "c0ffee",
        "mlflow.user": getpass.getuser(),
    }.items() <= run.data.tags.items()
    [given] = run.inputs.dataset_inputs
    assert (given.dataset.digest, given.tags[0].value) == ("d41d8.dir", "lifecycle")
    experiment = mlruns.experiment_id("returns")
    nested = mlruns.client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{whole.run_id}'")
    assert [run.info.run_id for run in nested] == [part.run_id]


def _work(root: Path, started: Event) -> None:
    mlruns = Mlruns(root)
    with (
        Tracker(mlruns, LIFECYCLE) as whole,
        Tracker(mlruns, replace(STAGE, lifecycle=whole.run_id), flush_every_s=0) as part,
    ):
        before = Path(alive_lock(mlruns, whole.run_id).lock_file)
        os.utime(before, (0, 0))
        part.log({"loss": 2.5}, step=1)
        started.set()
        time.sleep(60)


def test_a_killed_lifecycle_is_marked_with_its_stage_as_of_when_the_stage_was_last_seen(mlruns: Mlruns) -> None:
    started = processes.Event()
    process = processes.Process(target=_work, args=(mlruns.root, started))
    begun_ms = time.time() * 1000
    process.start()
    assert started.wait(60)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Tracker(mlruns, LIFECYCLE) as again:
        pass
    runs = mlruns.client.search_runs([mlruns.experiment_id("returns")], order_by=["attributes.start_time ASC"])
    killed = {run.data.tags["twinloop.stage"]: run for run in runs[:2]}
    assert {stage: run.info.status for stage, run in killed.items()} == {"lifecycle": "KILLED", "sft": "KILLED"}
    assert killed["lifecycle"].info.end_time >= begun_ms
    resumes = mlruns.client.get_run(again.run_id).data.tags["twinloop.resumes"]
    assert resumes == killed["lifecycle"].info.run_id


def test_the_curves_of_a_run_begin_with_those_of_the_killed_one_that_it_resumed(mlruns: Mlruns) -> None:
    def die() -> None:
        with Tracker(mlruns, STAGE) as first:
            first.log({"loss": 4.0}, step=1)
            first.log({"loss": 3.0}, step=2)
            runs.append(first.run_id)
            raise KeyboardInterrupt

    runs: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        die()
    with Tracker(mlruns, STAGE) as second:
        second.log({"loss": 3.5}, step=2)
        second.log({"loss": 2.0, "broken": float("nan")}, step=3)
        second.log({"loss": 2.0, "steps": 3})  # the stage's totals
    assert curves_of(mlruns, second.run_id) == {"loss": [(2, 3.5), (3, 2.0)]}
    second.tag({"twinloop.resumes": runs[0]})
    assert curves_of(mlruns, second.run_id) == {"loss": [(1, 4.0), (2, 3.5), (3, 2.0)]}
    assert curves_of(mlruns, "0" * 32) == {}, "a lost run"


def test_a_long_curve_is_thinned_to_what_a_figure_shows(mlruns: Mlruns) -> None:
    with Tracker(mlruns, STAGE) as tracker:
        for step in range(1, 2001):
            tracker.log({"loss": step / 7}, step=step)
    curve = curves_of(mlruns, tracker.run_id)["loss"]
    assert POINTS / 2 < len(curve) <= POINTS
    assert curve[-1][0] == 2000
    assert curve == sorted(curve)
