"""`make up` and `make down`: the Prefect server, its deployments and worker, MLflow's UI and the API, on this machine.

Each service is a process of its own session, with its log and its process id under state/services/. All that it starts
inherits its MARK, by which `down` finds also what a killed service left behind: a flow run has a session of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from flows.environment import prepare_environment
from models.errors import UserError
from tasks.context import find_project

READY_WITHIN_S = 180.0
STOP_WITHIN_S = 20.0
POOL = "twinloop"
GPU_SLOT = "gpu"
MODEL = "returns"
MARK = "TWINLOOP_SERVICE"
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
    prefect, here = [sys.executable, "-m", "prefect"], "127.0.0.1"
    found = [
        Service(
            "prefect",
            [*prefect, "server", "start", "--host", here, "--port", str(ports.prefect)],
            url=f"http://{here}:{ports.prefect}",
            health=f"http://{here}:{ports.prefect}/api/health",
        ),
        Service(
            "mlflow",
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", here, "--port", str(ports.mlflow)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{project}/mlruns/mlflow.db"),
                *("--artifacts-destination", str(project / "mlruns" / "artifacts")),
            ],
            url=f"http://{here}:{ports.mlflow}",
            health=f"http://{here}:{ports.mlflow}/health",
        ),
        Service("worker", [*prefect, "worker", "start", "--pool", POOL]),
        Service(
            "api",
            [sys.executable, "-m", "flows.cli", "serve", "--model", MODEL, "--port", str(ports.api)],
            url=f"http://{here}:{ports.api}",
            health=f"http://{here}:{ports.api}/health",
        ),
    ]
    return {service.name: service for service in found}


def up(project: Path, ports: Ports) -> None:
    """Start what is not running, deploy, and say where everything is. Raises UserError where one does not come up."""
    (project / "mlruns").mkdir(exist_ok=True)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{ports.prefect}/api"
    # Ten processes of 265 MB otherwise (MLflow 3.17).
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    ours = services(project, ports)
    for service in ours.values():
        _check_port(project, service)
    _start(project, ours["prefect"])
    _start(project, ours["mlflow"])
    _deploy(project)
    _start_worker(project, ours["worker"])
    if _has_champion(project):
        _start(project, ours["api"])
    else:
        print("api: not started, no model is promoted yet; `make run`, then `make up` again", file=sys.stderr)
    for service in ours.values():
        if service.url and _alive(project, service.name):
            print(f"{service.name:<8} {service.url}")


def down(project: Path) -> None:
    """Stop every service that `up` started, in the reverse order, and what is left of those that died."""
    for name in reversed(NAMES):
        process = _alive(project, name)
        if process is not None:
            _end([process])
        left = _marked(project, name)
        _end(left)
        _pid_file(project, name).unlink(missing_ok=True)
        if process is not None or left:
            print(f"{name:<8} stopped")


def running_prefect(project: Path) -> str | None:
    """The API of the Prefect server that `up` started, while it runs."""
    try:
        process = _alive(project, "prefect")
        command = process.cmdline() if process else []
        return f"http://127.0.0.1:{command[command.index('--port') + 1]}/api"
    except (ValueError, psutil.Error):  # there is none, or no more
        return None


def _deploy(project: Path) -> None:
    """What docs/operations.md tells a person to type. One job at a time in the pool: each measures, or trains."""
    _prefect(project, "work-pool", "create", POOL, "--type", "process", "--overwrite")
    _prefect(project, "work-pool", "set-concurrency-limit", POOL, "1")
    if not _prefect(project, "gcl", "inspect", GPU_SLOT, check=False):
        _prefect(project, "gcl", "create", GPU_SLOT, "--limit", "1")
    _prefect(project, "--no-prompt", "deploy", "--all")


def _start_worker(project: Path, worker: Service) -> None:
    """A worker that takes runs. What an earlier one left behind would keep the pool's only place: it is ended first."""
    if _alive(project, worker.name):
        return
    _end(_marked(project, worker.name))
    _crash_unfinished_runs()
    since = datetime.now(UTC)
    _launch(project, worker, ready=lambda: _worker_answers(since))


def _crash_unfinished_runs() -> None:
    """No worker of this machine lives, so no run of the pool goes on, whatever Prefect was told last."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.states import Crashed

    unfinished = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}})
    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=unfinished, work_pool_filter=pool):
            client.set_flow_run_state(run.id, Crashed(message="its worker is gone"), force=True)
            print(f"worker: run {run.name} was cut off; it is marked as crashed", file=sys.stderr)


def _worker_answers(since: datetime) -> bool:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(POOL)
    return any(worker.last_heartbeat_time and worker.last_heartbeat_time > since for worker in workers)


def _check_port(project: Path, service: Service) -> None:
    """Before anything is started. Raises UserError where another program has the port."""
    if service.health is None or _alive(project, service.name):
        return
    health = urlsplit(service.health)
    with socket.socket() as client:
        if client.connect_ex((health.hostname, health.port)) == 0:
            raise UserError(
                f"{service.name}: something else listens at {service.url}; stop it, or choose another port "
                f"(TWINLOOP_{service.name.upper()}_PORT)"
            )


def _start(project: Path, service: Service) -> None:
    if _alive(project, service.name):
        return
    assert service.health is not None
    health = service.health
    _launch(project, service, ready=lambda: _answers(health))


def _launch(project: Path, service: Service, *, ready: Callable[[], bool]) -> None:
    pid_file = _pid_file(project, service.name)
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    log = pid_file.with_suffix(".log")
    with log.open("ab") as output:
        before = output.tell()
        child = subprocess.Popen(
            service.command,
            cwd=project,
            env=os.environ | {MARK: _mark(project, service.name)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    pid_file.write_text(str(child.pid))
    deadline = time.monotonic() + READY_WITHIN_S
    while not ready():
        if child.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"{service.name}: did not come up ({_last_words(log, before)}); see {log}")
        time.sleep(0.2)


def _last_words(log: Path, since: int) -> str:
    """The last line that speaks of an error, or else the last."""
    lines = [line.strip() for line in log.read_bytes()[since:].decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:200]


def _alive(project: Path, name: str) -> psutil.Process | None:
    """The process that `up` started, if it runs. A process id alone may be another program's by now: ours has MARK."""
    try:
        process = psutil.Process(int(_pid_file(project, name).read_text()))
    except (OSError, ValueError, psutil.Error):
        return None
    return process if _has_mark(process, _mark(project, name)) else None


def _marked(project: Path, name: str) -> list[psutil.Process]:
    """Every process of that service, its children's children and orphans too."""
    mark = _mark(project, name)
    return [found for found in psutil.process_iter() if found.pid != os.getpid() and _has_mark(found, mark)]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):  # gone, or another user's
        return False


def _mark(project: Path, name: str) -> str:
    return f"{name} of {project}"


def _end(processes: list[psutil.Process]) -> None:
    """Ask each of them to end, and make those that do not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, processes = psutil.wait_procs(processes, timeout=STOP_WITHIN_S)


def _pid_file(project: Path, name: str) -> Path:
    return project / "state" / "services" / f"{name}.pid"


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


def _has_champion(project: Path) -> bool:
    from tasks.registry import CHAMPION, Registry
    from tasks.tracking import Mlruns

    return Registry(Mlruns(project / "mlruns"), MODEL).snapshot().alias(CHAMPION) is not None


def main() -> int:
    try:
        project = find_project()
        prepare_environment(project)
        if sys.argv[1:] == ["up"]:
            up(project, Ports.from_environment())
        elif sys.argv[1:] == ["down"]:
            down(project)
        else:
            raise UserError("python -m flows.services: say up or down")
    except UserError as error:
        print(f"twinloop: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
