"""Runs whose process is gone are marked as crashed, and nobody else's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_project import environment

CODE = """
import sys
from pathlib import Path
from twinloop.flows.environment import prepare_environment
from twinloop.flows.server import embedded_server, wait_until_ready
project, other = Path(sys.argv[1]) / "project", Path(sys.argv[1]) / "other"
for folder in (project, other):
    folder.mkdir()
prepare_environment(project)
with embedded_server(project):
    wait_until_ready(project)
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Running
    from twinloop.flows.runs import TAG, crash_dead_runs, marked_alive

    @flow
    def nothing() -> None:
        pass

    def states(*names: str) -> list[str]:
        with get_client(sync_client=True) as client:
            return [client.read_flow_run(runs[name]).state.type.value for name in names]

    runs = {}
    with get_client(sync_client=True) as client:
        def start(name: str, *tags: str) -> None:
            runs[name] = client.create_flow_run(nothing, tags=list(tags), state=Running()).id

        dead = "0" * 32
        (project / "state" / "runs").mkdir(parents=True)
        (project / "state" / "runs" / dead).touch()
        (project / "treasure").touch()
        start("dead", TAG + dead)
        from prefect import task as a_task

        task = client.create_task_run(a_task(lambda: None), runs["dead"], dynamic_key="0", state=Running()).id
        start("of another project", TAG + "1" * 32)
        start("malicious", TAG + "../../treasure")
        start("untagged")
        with marked_alive(project):
            [alive] = [path.name for path in (project / "state" / "runs").iterdir() if path.name != dead]
            start("alive", TAG + alive)
            crash_dead_runs(other)
            assert states(*runs) == ["RUNNING"] * 5, states(*runs)
            crash_dead_runs(project)
            assert states("dead") == ["CRASHED"]
            assert client.read_task_run(task).state.type.value == "CRASHED"
            assert states(*[name for name in runs if name != "dead"]) == ["RUNNING"] * 4, states(*runs)
    assert (project / "treasure").exists()
    assert not list((project / "state" / "runs").iterdir())
    print("all as it should be")
"""


@pytest.mark.slow
def test_only_this_projects_dead_runs_are_marked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("all as it should be\n"), done.stderr[-3000:]
