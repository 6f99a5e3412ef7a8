"""`make up` and `make down`: the Prefect server, its deployments and worker, MLflow's UI and the API, on this machine.

Each service is a process of its own session, with its log and its process id under state/services/.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.environment import prepare_environment
from models.errors import UserError
from tasks.context import find_project

READY_WITHIN_S = 180.0
STOP_WITHIN_S = 20.0
POOL = "twinloop"
GPU_SLOT = "gpu"
MODEL = "returns"


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

    prefect: int = int(os.environ.get("TWINLOOP_PREFECT_PORT", "4200"))
    mlflow: int = int(os.environ.get("TWINLOOP_MLFLOW_PORT", "5000"))
    api: int = int(os.environ.get("TWINLOOP_API_PORT", "8080"))


def services(project: Path, ports: Ports) -> list[Service]:
    """In the order in which they start."""
    prefect, here = [sys.executable, "-m", "prefect"], "127.0.0.1"
    return [
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
            [sys.executable, "-m", "flows.cli", "serve", "--port", str(ports.api)],
            url=f"http://{here}:{ports.api}",
            health=f"http://{here}:{ports.api}/health",
        ),
    ]


def up(project: Path, ports: Ports) -> None:
    """Start what is not running, deploy, and say where everything is. Raises UserError where one does not come up."""
    (project / "mlruns").mkdir(exist_ok=True)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{ports.prefect}/api"
    os.environ["TWINLOOP_PROJECT"] = str(project)
    # Ten processes of 265 MB otherwise (MLflow 3.17).
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    started = {service.name: service for service in services(project, ports)}
    _start(project, started["prefect"])
    _start(project, started["mlflow"])
    _prefect(project, "work-pool", "create", POOL, "--type", "process", "--overwrite")
    if not _prefect(project, "gcl", "inspect", GPU_SLOT, check=False):
        _prefect(project, "gcl", "create", GPU_SLOT, "--limit", "1")
    _prefect(project, "--no-prompt", "deploy", "--all")
    _start(project, started["worker"])
    if _has_champion(project):
        _start(project, started["api"])
    else:
        print("api: not started, no model is promoted yet; `make run`, then `make up` again", file=sys.stderr)
    for service in started.values():
        if service.url and _alive(project, service.name):
            print(f"{service.name:<8} {service.url}")


def down(project: Path) -> None:
    """Stop every service that `up` started, in the reverse order."""
    for service in reversed(services(project, Ports())):
        process = _alive(project, service.name)
        if process is None:
            continue
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_WITHIN_S)
        except psutil.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        _pid_file(project, service.name).unlink(missing_ok=True)
        print(f"{service.name:<8} stopped")


def _start(project: Path, service: Service) -> None:
    if _alive(project, service.name):
        return
    if service.health and _answers(service.health):
        raise UserError(
            f"{service.name}: something else answers at {service.url}; stop it, or choose another port "
            "(TWINLOOP_PREFECT_PORT, TWINLOOP_MLFLOW_PORT, TWINLOOP_API_PORT)"
        )
    pid_file = _pid_file(project, service.name)
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    log = pid_file.with_suffix(".log")
    with log.open("ab") as output:
        child = subprocess.Popen(
            service.command, cwd=project, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    # With the time it was born: a process id alone may be another program's by tomorrow.
    born = psutil.Process(child.pid).create_time()
    pid_file.write_text(json.dumps({"pid": child.pid, "born": born}))
    deadline = time.monotonic() + READY_WITHIN_S
    while service.health and not _answers(service.health):
        if child.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"{service.name}: did not come up; its last words are in {log}")
        time.sleep(0.2)


def _alive(project: Path, name: str) -> psutil.Process | None:
    try:
        noted = json.loads(_pid_file(project, name).read_text())
        process = psutil.Process(noted["pid"])
        return process if process.create_time() == noted["born"] and process.status() != "zombie" else None
    except (OSError, ValueError, KeyError, psutil.Error):
        return None


def _pid_file(project: Path, name: str) -> Path:
    return project / "state" / "services" / f"{name}.json"


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
            up(project, Ports())
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
