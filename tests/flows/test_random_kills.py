"""Kill -9 at random moments of a small lifecycle, spread over its stages and over the making of MLflow's database: the
next run ends with the same bytes, and nothing stays stuck.

TWINLOOP_KILLS sets how many kills each test tries: 60 took 20 minutes.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from small_project import make_project, start, twinloop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("TWINLOOP_KILLS", "6"))
KILLS_A_PROJECT = 6
AFTER_MLRUNS_S = 3.0
DONE = re.compile(r"^✓ (\S+)")


class Run:
    """`twinloop run`, with the moment at which each of its lines came."""

    def __init__(self, project: Path):
        self.process = start(project, "run", "recipes/small.yaml")
        self.started = time.monotonic()
        self.done: dict[str, float] = {"": 0.0}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := DONE.match(line):
                self.done[found[1]] = time.monotonic() - self.started

    def kill_after(self, stage: str, delay_s: float) -> bool:
        """Kill it so long after a stage was done; False where it was over before."""
        while self.process.poll() is None:
            if stage in self.done and time.monotonic() - self.started >= self.done[stage] + delay_s:
                self.process.kill()
                break
            time.sleep(0.001)
        self._reader.join()
        self.process.communicate()
        return self.process.returncode < 0


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has its data and nothing else."""
    project = make_project(tmp_path_factory.mktemp("fresh"))
    built = twinloop(project, "data", "build")
    assert built.returncode == 0, built.stderr
    return project


@pytest.fixture(scope="module")
def whole(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, float]]:
    """Of a run that nobody kills: the digest of each artifact, and when each stage was done."""
    project = shutil.copytree(fresh, tmp_path_factory.mktemp("whole") / "project")
    run = Run(project)
    assert run.process.wait() == 0
    run._reader.join()
    return artifacts(project), run.done


def artifacts(project: Path) -> dict[str, str]:
    """The digest of each artifact by stage and key; those that measure times are left out."""
    manifests = project.glob("artifacts/*/[0-9a-f]*/manifest.json")
    timed = ("evaluate", "gate")
    return {
        f"{path.parts[-3]}/{path.parts[-2]}": json.loads(path.read_text())["digest"]
        for path in manifests
        if path.parts[-3] not in timed
    }


def assert_whole(project: Path, done: subprocess.CompletedProcess[str], expected: dict[str, str]) -> None:
    """The last run shipped the same bytes, and nothing of the killed ones is left."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = artifacts(project)
    assert {name: found.get(name) for name in expected} == expected
    assert not list(project.glob("artifacts/*/.work/*")) + list(project.glob("artifacts/*/.new/*"))
    status = json.loads(twinloop(project, "status", "--model", "small", "--json").stdout)
    assert status["champion"]["gate"] == "SHIP"
    assert status["warnings"] == []
    with closing(sqlite3.connect(project / "mlruns" / "mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone() == (0,)
    with closing(sqlite3.connect(project / "state" / "prefect" / "prefect.db")) as database:
        states = {state for (state,) in database.execute("SELECT state_type FROM flow_run")}
    assert states <= {"COMPLETED", "CRASHED", "FAILED"}


@pytest.mark.parametrize("number", range(-(-KILLS // KILLS_A_PROJECT)))
def test_kills_spread_over_the_stages_end_bit_equal(
    number: int, fresh: Path, whole: tuple[dict[str, str], dict[str, float]], tmp_path: Path
) -> None:
    expected, done = whole
    stages = list(done)
    project = shutil.copytree(fresh, tmp_path / "project")
    chance = random.Random(number)
    kills = min(KILLS_A_PROJECT, KILLS - number * KILLS_A_PROJECT)
    # Each kill falls into its own part of the lifecycle, and the projects take turns at the stages of a part.
    parts = [stages[part * len(stages) // kills : (part + 1) * len(stages) // kills] for part in range(kills)]
    for part in parts:
        stage = part[number % len(part)]
        following = stages[min(stages.index(stage) + 1, len(stages) - 1)]
        killed = Run(project).kill_after(stage, chance.uniform(0, max(done[following] - done[stage], 0.2)))
        assert killed, f"it was over before it could be killed after {stage}"
    assert_whole(project, twinloop(project, "run", "recipes/small.yaml"), expected)


@pytest.mark.parametrize("number", range(-(-KILLS // 3)))
def test_kills_while_mlflows_database_is_made_end_bit_equal(
    number: int, fresh: Path, whole: tuple[dict[str, str], dict[str, float]], tmp_path: Path
) -> None:
    project = shutil.copytree(fresh, tmp_path / "project")
    process = start(project, "run", "recipes/small.yaml")
    while not (project / "mlruns").exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(AFTER_MLRUNS_S * (number + 0.5) / -(-KILLS // 3))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_whole(project, twinloop(project, "run", "recipes/small.yaml"), whole[0])
