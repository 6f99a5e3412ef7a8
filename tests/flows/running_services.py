"""A project whose recipe is small, and its services of `make up` on free ports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from small_project import PROJECT, environment, make_ready_project, recipe_fields

from twinloop.common.strict_yaml import parse_yaml

BUSY_TRIES = 20


class Services:
    """The services of one project, as a person starts, asks and stops them."""

    def __init__(self, folder: Path):
        self.project = make_ready_project(folder)
        for name in ("prefect.yaml", "prefect.toml"):
            shutil.copy(PROJECT / name, self.project / name)
        self.write_recipe(tokens=20_000)
        self.ports = {name: free_port() for name in ("prefect", "mlflow", "api")}

    def write_recipe(self, *, tokens: int) -> None:
        recipe = recipe_fields(pretrain={"tokens": tokens}) | {"name": "returns"}
        (self.project / "recipes" / "returns.yaml").write_text(json.dumps(recipe))
        params = self.project / "params.yaml"
        params.write_text(json.dumps(parse_yaml(params.read_text()) | {"recipe": "recipes/returns.yaml"}))

    def say(self, word: str) -> subprocess.CompletedProcess[str]:
        ports = {f"TWINLOOP_{name.upper()}_PORT": str(port) for name, port in self.ports.items()}
        command = [sys.executable, "-m", "twinloop.flows.services", word]
        return subprocess.run(
            command, cwd=self.project, env=environment() | ports, capture_output=True, text=True, check=False
        )

    def auth(self) -> tuple[str, str]:
        """The user and the password that Prefect asks for."""
        user, _, password = (self.project / "state" / "prefect.auth").read_text().strip().partition(":")
        return user, password

    def request(self, service: str, path: str, body: object = None, **options: Any) -> httpx.Response:
        """A GET, or a POST with a JSON body, without credentials."""
        method = "GET" if body is None else "POST"
        url = f"http://127.0.0.1:{self.ports[service]}{path}"
        return httpx.request(method, url, json=body, timeout=30, trust_env=False, **options)

    def ask(self, service: str, path: str, body: object = None) -> Any:
        """What the service answers to its operator."""
        auth = self.auth() if service != "api" else None
        return _once_not_busy(lambda: self.request(service, path, body, auth=auth)).json()

    def patch(self, path: str, body: object) -> None:
        """Change something on Prefect's server, as its pages do."""
        url = f"http://127.0.0.1:{self.ports['prefect']}{path}"
        _once_not_busy(lambda: httpx.patch(url, json=body, timeout=30, trust_env=False, auth=self.auth()))

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {found["name"]: found for found in self.ask("prefect", "/api/deployments/filter", {})}

    def trigger(self, name: str, **options: object) -> str:
        path = f"/api/deployments/{self.deployments()[name]['id']}/create_flow_run"
        return str(self.ask("prefect", path, options)["id"])

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

    def processes(self) -> list[psutil.Process]:
        """Whatever has this project in its environment, works in it, or names it."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.project) in json.dumps([process.environ(), process.cwd(), process.cmdline()]):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(holds: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


def _once_not_busy(send: Callable[[], httpx.Response]) -> httpx.Response:
    """Prefect says 503 while its database is busy; as its own client does, it is asked again."""
    for _ in range(BUSY_TRIES):
        response = send()
        if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(1)
    return response.raise_for_status()
