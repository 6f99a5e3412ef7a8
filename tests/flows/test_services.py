"""`make up` and `make down`: everything runs on schedules, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from small_project import PROJECT, RECIPE, environment, make_project, twinloop

from flows import services
from flows.services import MARK, Ports
from models.errors import UserError

ORDER = {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12}


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], env={}) as process:
        yield process
        process.kill()


def test_a_port_that_is_none_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWINLOOP_PREFECT_PORT", raising=False)
    monkeypatch.setenv("TWINLOOP_MLFLOW_PORT", "5001")
    assert Ports.from_environment() == Ports(prefect=4200, mlflow=5001, api=8080)
    for wrong in ("x", "0", "65536", "-1", "٣"):
        monkeypatch.setenv("TWINLOOP_API_PORT", wrong)
        with pytest.raises(UserError, match=f"TWINLOOP_API_PORT={wrong}: not a port"):
            Ports.from_environment()


def test_a_port_in_use_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"):
        monkeypatch.setenv(name, "")  # so that it is as it was again afterwards
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = Ports(prefect=taken.getsockname()[1])
        with pytest.raises(UserError, match=r"prefect: something else listens .*TWINLOOP_PREFECT_PORT"):
            services.up(tmp_path, ports)


def test_a_process_id_that_became_another_programs_is_left_alone(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "state" / "services").mkdir(parents=True)
    (tmp_path / "state" / "services" / "worker.pid").write_text(str(bystander.pid))
    services.down(tmp_path)
    assert bystander.poll() is None


def test_what_a_killed_service_left_behind_is_ended(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    def orphan(project: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "600"], env={MARK: f"worker of {project}"}, start_new_session=True)

    ours, of_another_project = orphan(tmp_path), orphan(tmp_path / "other")
    try:
        services.down(tmp_path)
        assert not psutil.pid_exists(ours.pid)
        assert of_another_project.poll() is None
        assert bystander.poll() is None
    finally:
        of_another_project.kill()
        of_another_project.wait()


# --- the whole, for real ----------------------------------------------------------------------------------------------


class Services:
    """A project whose recipe is small, and its services on free ports."""

    def __init__(self, folder: Path):
        self.project = make_project(folder)
        for name in ("prefect.yaml", "prefect.toml"):
            shutil.copy(PROJECT / name, self.project / name)
        self.write_recipe(tokens=20_000)
        self.ports = {name: _free_port() for name in ("prefect", "mlflow", "api")}

    def write_recipe(self, *, tokens: int) -> None:
        recipe = RECIPE | {"name": "returns", "pretrain": RECIPE["pretrain"] | {"tokens": tokens}}
        (self.project / "recipes" / "returns.yaml").write_text(yaml.safe_dump(recipe))

    def say(self, word: str) -> subprocess.CompletedProcess[str]:
        ports = {f"TWINLOOP_{name.upper()}_PORT": str(port) for name, port in self.ports.items()}
        command = [sys.executable, "-m", "flows.services", word]
        return subprocess.run(
            command, cwd=self.project, env=environment() | ports, capture_output=True, text=True, check=False
        )

    def ask(self, service: str, path: str, body: object = None) -> Any:
        response = httpx.request(
            "GET" if body is None else "POST",
            f"http://127.0.0.1:{self.ports[service]}{path}",
            json=body,
            timeout=30,
            trust_env=False,
        )
        response.raise_for_status()
        return response.json()

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {found["name"]: found for found in self.ask("prefect", "/api/deployments/filter", {})}

    def trigger(self, name: str) -> str:
        run = self.ask("prefect", f"/api/deployments/{self.deployments()[name]['id']}/create_flow_run", {})
        return str(run["id"])

    def start_long_run(self) -> str:
        """A lifecycle that will not end by itself within a test."""
        self.write_recipe(tokens=50_000_000)
        run = self.trigger("lifecycle")
        wait_for(lambda: self.state(run) == "RUNNING")
        return run

    def kill_worker(self) -> None:
        os.kill(int((self.project / "state" / "services" / "worker.pid").read_text()), signal.SIGKILL)

    def state(self, run: str) -> str:
        return str(self.ask("prefect", f"/api/flow_runs/{run}")["state_type"])

    def scheduled(self) -> set[str]:
        body = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "limit": 200}
        return {run["deployment_id"] for run in self.ask("prefect", "/api/flow_runs/filter", body)}

    def processes(self) -> list[str]:
        """Whatever has this project in its environment or works in it."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.project) in json.dumps([process.environ(), process.cwd(), process.cmdline()]):
                    found.append(f"{process.pid} {process.cmdline()}")
            except (psutil.Error, OSError):
                continue
        return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(holds: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    ours = Services(tmp_path_factory.mktemp("services"))
    up = ours.say("up")
    try:
        assert up.returncode == 0, up.stderr
        assert "api: not started, no model is promoted yet" in up.stderr
        yield ours
    finally:
        ours.say("down")


@pytest.mark.slow
def test_every_deployment_is_scheduled_one_at_a_time(running: Services) -> None:
    deployments = running.deployments()
    assert set(deployments) == {"data-refresh", "lifecycle", "release-check"}
    for found in deployments.values():
        assert found["pull_steps"] == [
            {"prefect.deployments.steps.set_working_directory": {"directory": str(running.project)}}
        ]
    minutes = [found["schedules"][0]["schedule"]["cron"].split()[0] for found in deployments.values()]
    assert sorted(minutes) == ["0", "0", "30"]
    wait_for(lambda: running.scheduled() >= {found["id"] for found in deployments.values()})
    assert running.ask("prefect", "/api/work_pools/twinloop")["concurrency_limit"] == 1
    assert running.ask("prefect", "/api/v2/concurrency_limits/gpu")["limit"] == 1


@pytest.mark.slow
def test_the_worker_runs_what_is_triggered_and_the_api_serves_it(running: Services) -> None:
    runs = [running.trigger(name) for name in ("data-refresh", "lifecycle", "release-check")]
    wait_for(lambda: all(running.state(run) in ("COMPLETED", "FAILED", "CRASHED") for run in runs), seconds=400)
    log = (running.project / "state" / "services" / "worker.log").read_text()
    assert [running.state(run) for run in runs] == ["COMPLETED"] * 3, log[-3000:]
    found = running.ask("mlflow", "/api/2.0/mlflow/experiments/search", {"max_results": 10})["experiments"]
    assert "returns" in [experiment["name"] for experiment in found]
    again = running.say("up")
    assert again.returncode == 0, again.stderr
    assert f"api      http://127.0.0.1:{running.ports['api']}" in again.stdout
    answer = running.ask("api", "/v1/decisions", {"order": ORDER, "message": "hello"})
    assert answer["model"] == running.ask("api", "/health")["model"]


@pytest.mark.slow
def test_a_run_from_the_command_line_reports_to_the_server_that_is_up(running: Services) -> None:
    before = running.ask("prefect", "/api/flow_runs/count", {})
    assert twinloop(running.project, "run", "recipes/returns.yaml").returncode == 0
    assert running.ask("prefect", "/api/flow_runs/count", {}) > before


@pytest.mark.slow
def test_a_run_that_died_with_its_worker_does_not_keep_the_others_waiting(running: Services) -> None:
    run = running.start_long_run()
    running.kill_worker()
    for process in services._marked(running.project, "worker"):
        process.kill()
    assert running.state(run) == "RUNNING"
    assert "was cut off; it is marked as crashed" in running.say("up").stderr
    assert running.state(run) == "CRASHED"


@pytest.mark.slow
def test_down_leaves_nothing_even_when_the_worker_was_killed(running: Services) -> None:
    running.start_long_run()
    running.kill_worker()
    assert any("prefect.engine" in line for line in running.processes())
    down = running.say("down")
    assert down.returncode == 0, down.stderr
    assert [line.split()[0] for line in down.stdout.splitlines()][-3:] == ["worker", "mlflow", "prefect"]
    assert running.processes() == []
    for port in running.ports.values():
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
