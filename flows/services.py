"""`make up` and `make down`: Prefect's server, its deployments and worker, MLflow's UI and the API, on this machine."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from twinloop.common.errors import UserError
from twinloop.flows.edge import run_command
from twinloop.flows.environment import prepare_environment
from twinloop.flows.processes import alive, end, launch, marked, stop
from twinloop.flows.runs import crash_runs_of_pool
from twinloop.flows.secret import auth_file, prefect_client
from twinloop.flows.server import server_command
from twinloop.tasks.context import find_project
from twinloop.tasks.recipe import default_model

POOL = "twinloop"
GPU_SLOT = "gpu"
ROTATION = "rotation"
DEPLOYED = "twinloop_deployed"
"""Prefect's variable that names what was last deployed on its server."""
NAMES = ("prefect", "mlflow", "worker", "api")
"""In the order in which they start."""


@dataclass(frozen=True)
class Service:
    name: str
    command: list[str]
    url: str | None = None
    """What a person opens; None for a service without a page."""
    health: str | None = None


@dataclass(frozen=True)
class Ports:
    """Of the local machine only: nothing listens to the network unless it is put behind something that may."""

    prefect: int = 4200
    mlflow: int = 5000
    api: int = 8080

    @classmethod
    def from_environment(cls) -> Ports:
        """TWINLOOP_PREFECT_PORT and so on, where they are set. Raises UserError for what is no port."""
        return cls(**{name: _port(f"TWINLOOP_{name.upper()}_PORT", getattr(cls, name)) for name in cls.__annotations__})


def _port(variable: str, default: int) -> int:
    given = os.environ.get(variable) or str(default)
    if not given.isascii() or not given.isdigit() or not 0 < int(given) < 65536:
        raise UserError(f"{variable}={given}: not a port; choose a number between 1 and 65535")
    return int(given)


def services(project: Path, ports: Ports) -> dict[str, Service]:
    """By name, in the order in which they start."""
    here = "127.0.0.1"
    found = [
        Service(
            "prefect",
            server_command(project, ports.prefect),
            url=f"http://{here}:{ports.prefect}",
            health=f"http://{here}:{ports.prefect}/api/health",
        ),
        Service(
            "mlflow",
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", here, "--port", str(ports.mlflow)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{project}/mlruns/mlflow.db"),
                *("--artifacts-destination", str(project / "mlruns" / "artifacts")),
                # By default also whatever begins like a private address, "10.example.com" too (3.17).
                *("--allowed-hosts", f"{here}:*,localhost:*"),
                *("--app-name", "twinloop"),  # flows/mlflow_app.py
            ],
            url=f"http://{here}:{ports.mlflow}",
            health=f"http://{here}:{ports.mlflow}/health",
        ),
        Service("worker", [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL]),
        Service(
            "api",
            [
                sys.executable,
                "-m",
                "twinloop.flows.cli",
                "serve",
                "--model",
                default_model(project),
                "--port",
                str(ports.api),
            ],
            url=f"http://{here}:{ports.api}",
            health=f"http://{here}:{ports.api}/health",
        ),
    ]
    return {service.name: service for service in found}


def up(project: Path, ports: Ports) -> None:
    """Start what is not running, deploy, and print where everything is. Raises UserError where one does not come up."""
    (project / "mlruns").mkdir(exist_ok=True)
    # Ten processes of 265 MB otherwise (MLflow 3.17).
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    ours = services(project, ports)
    for service in ours.values():
        _check_port(project, service)
    _start_rotation(project)
    with prefect_client(project, f"http://127.0.0.1:{ports.prefect}/api"):
        if alive(project, "prefect") and not _runs(project, ours["prefect"]):
            stop(project, "worker")  # it knows the server that is stopped now, at another port or without a secret
        _start(project, ours["prefect"])
        _prepare_mlflow(project)
        _start(project, ours["mlflow"])
        _deploy(project)
        _start_worker(project, ours["worker"])
        if _has_champion(project):
            _start(project, ours["api"])
        else:
            print("api: not started, no model is promoted yet; `make run`, then `make up` again", file=sys.stderr)
    for service in ours.values():
        if service.url and alive(project, service.name):
            asks = f"  (asks for the line in {auth_file(project)})" if service.name != "api" else ""
            print(f"{service.name:<8} {service.url}{asks}")


def down(project: Path) -> None:
    """Stop every service that `up` started, in the reverse order, and what is left of those that died."""
    for name in reversed(NAMES):
        if stop(project, name):
            print(f"{name:<8} stopped")
    stop(project, ROTATION)


def _start_rotation(project: Path) -> None:
    if not alive(project, ROTATION):
        command = [sys.executable, "-m", "twinloop.flows.service_log", str(project / "state" / "services")]
        launch(project, ROTATION, command, ready=lambda: True)


def _deploy(project: Path) -> None:
    """The commands of docs/operations.md, unless this prefect.yaml was deployed on this server already: they would take
    back what an operator has changed there since. One job at a time in the pool: each measures, or trains."""
    from prefect.client.orchestration import get_client

    wanted = _deployment_digest(project)
    with get_client(sync_client=True) as client:
        pools = {pool.name: pool for pool in client.read_work_pools()}
        deployed = client.read_variable_by_name(DEPLOYED)
        paused = [each.id for each in client.read_deployments() if each.paused]
    if POOL in pools and deployed and deployed.value == wanted:
        return
    template = ("--base-job-template", str(Path(__file__).with_name("work_pool.json")))
    _prefect(project, "work-pool", "create", POOL, "--type", "process", *template, "--overwrite")
    if POOL not in pools:
        _prefect(project, "work-pool", "set-concurrency-limit", POOL, "1")
    else:  # which `create` has set to its defaults
        if (limit := pools[POOL].concurrency_limit) is not None:
            _prefect(project, "work-pool", "set-concurrency-limit", POOL, str(limit))
        if pools[POOL].is_paused:
            _prefect(project, "work-pool", "pause", POOL)
    if not _prefect(project, "gcl", "inspect", GPU_SLOT, check=False):
        _prefect(project, "gcl", "create", GPU_SLOT, "--limit", "1")
    _prefect(project, "--no-prompt", "deploy", "--all")
    with get_client(sync_client=True) as client:
        for each in paused:  # of a schedule `deploy` keeps that it is paused, of a whole deployment it does not (3.8)
            client.pause_deployment(each)
    _prefect(project, "variable", "set", DEPLOYED, wanted, "--overwrite")


def _deployment_digest(project: Path) -> str:
    """Of all that `prefect deploy` reads: a moved project too is deployed anew."""
    files = (project / "prefect.yaml", Path(__file__).with_name("work_pool.json"))
    content = b"\0".join([str(project).encode(), *(path.read_bytes() for path in files)])
    return hashlib.sha256(content).hexdigest()


def _start_worker(project: Path, worker: Service) -> None:
    """A worker that takes runs. What an earlier one left behind would keep the pool's only place: it is ended first."""
    if alive(project, worker.name):
        return
    end(marked(project, worker.name))
    crash_runs_of_pool(POOL)
    since = datetime.now(UTC)
    launch(project, worker.name, worker.command, ready=lambda: _worker_answers(since))


def _worker_answers(since: datetime) -> bool:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(POOL)
    return any(worker.last_heartbeat_time and worker.last_heartbeat_time > since for worker in workers)


def _check_port(project: Path, service: Service) -> None:
    """Before anything is started. Raises UserError where another program has the port."""
    if service.health is None:
        return
    health = urlsplit(service.health)
    if (ours := alive(project, service.name)) and str(health.port) in ours.cmdline():
        return
    with socket.socket() as client:
        if client.connect_ex((health.hostname, health.port)) == 0:
            raise UserError(
                f"{service.name}: something else listens at {service.url}; stop it, or choose another port "
                f"(TWINLOOP_{service.name.upper()}_PORT)"
            )


def _start(project: Path, service: Service) -> None:
    """Start the service unless it runs as it should. One with other settings, or of an earlier version of this program,
    is stopped first."""
    if _runs(project, service):
        return
    stop(project, service.name)
    assert service.health is not None
    health = service.health
    launch(project, service.name, service.command, ready=lambda: _answers(health))


def _runs(project: Path, service: Service) -> bool:
    try:
        process = alive(project, service.name)
        return process is not None and process.cmdline() == service.command
    except psutil.Error:  # it ends just now
        return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _prefect(project: Path, *arguments: str, check: bool = True) -> bool:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=project,
        env=os.environ | {"COLUMNS": "1000"},  # it breaks its messages into lines
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()
        raise UserError(f"prefect {' '.join(arguments)}: {last[-1] if last else 'failed'}")
    return done.returncode == 0


def _prepare_mlflow(project: Path) -> None:
    """Its server would make the database in its place, and leave it half-made where it dies."""
    from twinloop.registry.tracking import Mlruns

    Mlruns(project / "mlruns").prepare_database()


def _has_champion(project: Path) -> bool:
    from twinloop.registry.versions import CHAMPION, Registry

    return Registry.of(project, default_model(project)).snapshot().alias(CHAMPION) is not None


def main() -> int:
    project = find_project()
    prepare_environment(project)
    if sys.argv[1:] == ["up"]:
        up(project, Ports.from_environment())
    elif sys.argv[1:] == ["down"]:
        down(project)
    else:
        raise UserError("python -m twinloop.flows.services: the argument is up or down")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
