"""`make up` and `make down`: everything runs on schedules, and nothing is left behind."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from running_services import Services, free_port, wait_for
from small_project import PROJECT, twinloop

from twinloop.common.errors import UserError
from twinloop.flows import services
from twinloop.flows.processes import MARK, alive, marked
from twinloop.flows.services import Ports

ORDER = {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12}


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], env={}) as process:
        yield process
        process.kill()


def test_a_port_that_is_none_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWINLOOP_PREFECT_PORT", raising=False)
    monkeypatch.setenv("TWINLOOP_MLFLOW_PORT", "5001")
    assert Ports.from_environment() == Ports(prefect=4200, mlflow=5001, api=8080)
    for wrong in ("x", "0", "65536", "-1", "٣"):
        monkeypatch.setenv("TWINLOOP_API_PORT", wrong)
        with pytest.raises(UserError, match=f"TWINLOOP_API_PORT={wrong}: not a port"):
            Ports.from_environment()


def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"):
        monkeypatch.setenv(name, "")  # so that it is as it was again afterwards
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = Ports(prefect=taken.getsockname()[1])
        (tmp_path / "params.yaml").write_text(f"recipe: {PROJECT / 'recipes' / 'tiny.yaml'}\n")
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


def test_a_service_with_other_settings_is_started_anew(tmp_path: Path) -> None:
    def page(port: int) -> services.Service:
        address = f"http://127.0.0.1:{port}/"
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        return services.Service("api", command, url=address, health=address)

    first, second = page(free_port()), page(free_port())
    try:
        services._start(tmp_path, first)
        before = alive(tmp_path, "api")
        services._start(tmp_path, first)
        assert alive(tmp_path, "api") == before
        services._check_port(tmp_path, first)
        services._start(tmp_path, second)
        assert before
        assert not before.is_running()
        assert services._answers(str(second.health))
    finally:
        services.down(tmp_path)
    assert not services._answers(str(second.health))


# --- the whole, for real ----------------------------------------------------------------------------------------------


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
def test_what_an_operator_has_set_in_prefect_stays(running: Services) -> None:
    deployments = running.deployments()
    paused, changed = deployments["data-refresh"], deployments["release-check"]
    running.patch(f"/api/deployments/{paused['id']}/schedules/{paused['schedules'][0]['id']}", {"active": False})
    running.patch(
        f"/api/deployments/{changed['id']}/schedules/{changed['schedules'][0]['id']}",
        {"schedule": {"cron": "15 * * * *", "timezone": "UTC"}},
    )
    running.patch("/api/work_pools/twinloop", {"concurrency_limit": 2, "is_paused": True})
    running.patch(f"/api/deployments/{deployments['lifecycle']['id']}", {"paused": True})

    def settings() -> tuple[object, ...]:
        found = running.deployments()
        pool = running.ask("prefect", "/api/work_pools/twinloop")
        schedules = [found[name]["schedules"][0] for name in ("data-refresh", "release-check")]
        return schedules[0]["active"], schedules[1]["schedule"]["cron"], pool["concurrency_limit"], pool["is_paused"]

    again = running.say("up")
    assert again.returncode == 0, again.stderr
    assert settings() == (False, "15 * * * *", 2, True)

    path = running.project / "prefect.yaml"
    path.write_text(path.read_text().replace('"0 2 * * *"', '"10 2 * * *"'))
    again = running.say("up")
    assert again.returncode == 0, again.stderr
    assert settings() == (False, "30 * * * *", 2, True)  # the file has changed: its crons hold again
    assert running.deployments()["data-refresh"]["schedules"][0]["schedule"]["cron"] == "10 2 * * *"
    assert running.deployments()["lifecycle"]["paused"]
    running.patch(f"/api/deployments/{deployments['lifecycle']['id']}", {"paused": False})
    running.patch("/api/work_pools/twinloop", {"concurrency_limit": 1, "is_paused": False})


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
    for process in marked(running.project, "worker"):
        process.kill()
    assert running.state(run) == "RUNNING"
    assert "was cut off; it is marked as crashed" in running.say("up").stderr
    assert running.state(run) == "CRASHED"


@pytest.mark.slow
def test_down_leaves_nothing_even_when_the_worker_was_killed(running: Services) -> None:
    running.start_long_run()
    running.kill_worker()
    assert any("prefect.engine" in process.cmdline() for process in running.processes())
    down = running.say("down")
    assert down.returncode == 0, down.stderr
    # The orphaned run may have ended by itself, at the first line that it printed to nobody: then no worker is named.
    stopped = [line.split()[0] for line in down.stdout.splitlines()]
    assert [name for name in stopped if name != "worker"] == ["api", "mlflow", "prefect"]
    assert running.processes() == []
    for port in running.ports.values():
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
