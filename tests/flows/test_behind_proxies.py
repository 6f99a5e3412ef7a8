"""Every command reaches this project's own servers where the environment names proxies that nobody can use."""

from __future__ import annotations

from pathlib import Path

import pytest
from running_services import Services
from small_project import environment, twinloop

pytestmark = pytest.mark.slow

DEAD = {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "no_proxy": "example.com",
}


def test_services_a_run_and_status_by_mlflows_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in DEAD.items():
        monkeypatch.setenv(name, value)
    services = Services(tmp_path)
    up = services.say("up")
    try:
        assert up.returncode == 0, up.stderr
        run = twinloop(services.project, "run")  # on the server that is up; at its end a server answers over HTTP
        assert run.returncode == 0, run.stdout + run.stderr
        user, password = services.auth()
        mlflow = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{services.ports['mlflow']}",
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }
        monkeypatch.setattr("small_project.environment", lambda: environment() | mlflow)
        status = twinloop(services.project, "status")
        assert status.returncode == 0, status.stderr
        assert "champion   version" in status.stdout
    finally:
        services.say("down")
