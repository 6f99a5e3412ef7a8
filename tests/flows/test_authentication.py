"""Nobody but the operator gets in: every port of `make up`, and the server inside `twinloop run`, without credentials,
under foreign host names and from foreign web pages."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from chromium import chromium, needs_chromium
from http_answers import answering
from running_services import Services
from small_project import environment

from twinloop.common.errors import UserError
from twinloop.flows.secret import auth_string


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    first = auth_string(tmp_path)
    path = tmp_path / "state" / "prefect.auth"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert auth_string(tmp_path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first not in auth_string(tmp_path / "another")


def test_a_link_is_not_taken_for_the_secret(tmp_path: Path) -> None:
    secret = auth_string(tmp_path / "other")
    foreign = tmp_path / "foreign"
    foreign.write_text(secret)
    foreign.chmod(0o644)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "prefect.auth").symlink_to(foreign)
    with pytest.raises(UserError, match=r"prefect\.auth: holds no .*remove it"):
        auth_string(tmp_path)
    assert stat.S_IMODE(foreign.stat().st_mode) == 0o644


@pytest.mark.parametrize("content", ["", "twinloop:", "twinloop:short", "\xff\xfe"])
def test_a_corrupt_secret_is_reported_in_one_line(tmp_path: Path, content: str) -> None:
    auth_string(tmp_path)
    (tmp_path / "state" / "prefect.auth").write_text(content)
    with pytest.raises(UserError, match=r"prefect\.auth: holds no .*remove it"):
        auth_string(tmp_path)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address and the secret of a server as `twinloop run` brings it."""
    code = """
import os, sys
from pathlib import Path
from twinloop.flows.environment import prepare_environment
from twinloop.flows.server import embedded_server, wait_until_ready
project = Path(sys.argv[1])
prepare_environment(project)
with embedded_server(project):
    wait_until_ready(project)
    print(os.environ["PREFECT_API_URL"], os.environ["PREFECT_API_AUTH_STRING"], flush=True)
    sys.stdin.read()
"""
    project = tmp_path_factory.mktemp("embedded")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(project)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        url, secret = run.stdout.readline().split()
        yield url, secret
        assert run.stdin is not None
        run.stdin.close()


def ask(url: str, secret: str | None = None, **headers: str) -> int:
    """The status of a POST that lists flows, as a program or, with an Origin, a web page would send it."""
    auth = tuple(secret.split(":", 1)) if secret else None
    return httpx.post(
        f"{url}/flows/filter", json={}, headers=headers, auth=auth, trust_env=False, timeout=30
    ).status_code


@pytest.mark.slow
def test_the_server_of_a_run_asks_for_the_secret(embedded: tuple[str, str]) -> None:
    url, secret = embedded
    assert ask(url, secret) == 200
    assert ask(url) == 401
    assert ask(url, "twinloop:wrong") == 401
    assert ask(url, secret, Origin=url.removesuffix("/api")) == 200


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1"])
def test_the_server_of_a_run_refuses_foreign_pages_even_with_the_secret(embedded: tuple[str, str], origin: str) -> None:
    url, secret = embedded
    assert ask(url, secret, Origin=origin) == 403


@pytest.mark.slow
@pytest.mark.parametrize(
    "host", ["evil.example", "a{b.example.com:8080", "", "127.0.0.1.evil.example", "10.evil.example", "localhost.evil"]
)
def test_the_server_of_a_run_refuses_foreign_host_names_even_with_the_secret(
    embedded: tuple[str, str], host: str
) -> None:
    url, secret = embedded
    assert 400 <= ask(url, secret, Host=host) < 500


# --- make up, for real ------------------------------------------------------------------------------------------------


def listening(running: Services) -> dict[tuple[str, int], list[str]]:
    """Every address at which a process of this project listens, with the process's command."""
    found = {}
    for process in running.processes():
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = process.cmdline()
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_only_known_ports_listen_and_on_this_machine_only(running: Services) -> None:
    addresses = listening(running)
    named = {("127.0.0.1", running.ports[name]) for name in ("prefect", "mlflow")}
    assert named <= addresses.keys()
    # Prefect's worker takes the reports of its own flow runs, each with a token of its own (3.8).
    [worker] = addresses.keys() - named
    assert worker[0] == "127.0.0.1"
    assert "worker" in addresses[worker]
    for said in (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"\0" * 64):
        with socket.create_connection(worker, timeout=30) as client:
            client.sendall(said)
            with suppress(ConnectionResetError):
                assert client.recv(1024) == b""


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(
    "host", ["evil.example", "a{b.example.com:8080", "10.evil.example", "192.168.0.1.evil.example"]
)
def test_no_service_answers_under_a_foreign_name(running: Services, host: str) -> None:
    for service, path in (("prefect", "/"), ("prefect", "/api/admin/version"), ("mlflow", "/")):
        refused = running.request(service, path, headers={"Host": f"{host}:{running.ports[service]}"})
        assert 400 <= refused.status_code < 500, (service, path)


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null"])
def test_mlflow_changes_nothing_for_a_foreign_page(running: Services, origin: str) -> None:
    body = {"name": "made by a page"}
    create = "/api/2.0/mlflow/experiments/create"
    foreign = running.request("mlflow", create, body, headers={"Origin": origin}, auth=running.auth())
    assert foreign.status_code == 403
    names = running.ask("mlflow", "/api/2.0/mlflow/experiments/search", {"max_results": 100})["experiments"]
    assert "made by a page" not in [experiment["name"] for experiment in names]


@pytest.mark.slow
def test_another_user_of_the_machine_reads_no_file_through_mlflow(running: Services, tmp_path: Path) -> None:
    """An experiment may say where its files are, and MLflow's server reads and writes them as the operator."""
    steps = [
        ("/api/2.0/mlflow/experiments/create", {"name": "e", "artifact_location": f"file://{tmp_path}"}),
        ("/api/2.0/mlflow/runs/create", {"experiment_id": "0"}),
        ("/get-artifact?run_uuid=x&path=prefect.auth", None),
        ("/ajax-api/2.0/mlflow/upload-artifact?run_uuid=x&path=x", {}),
        ("/api/2.0/mlflow-artifacts/artifacts", None),
        ("/ajax-api/2.0/mlflow/experiments/search", {"max_results": 1}),
        ("/graphql", {}),
        ("/", None),
    ]
    for path, body in steps:
        assert running.request("mlflow", path, body).status_code == 401, path
        assert running.request("mlflow", path, body, auth=("twinloop", "wrong")).status_code == 401, path
    assert running.request("mlflow", "/health").status_code == 200
    assert running.request("mlflow", "/", auth=running.auth()).status_code == 200


@pytest.mark.slow
@needs_chromium
def test_mlflows_page_opens_with_the_secret_and_asks_no_other_host(running: Services) -> None:
    address = f"http://127.0.0.1:{running.ports['mlflow']}"
    user, password = running.auth()
    asked: list[str] = []
    with chromium() as browser:
        page = browser.new_page(http_credentials={"username": user, "password": password})
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_text("Experiments").first.wait_for(timeout=30_000)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
def test_nothing_of_prefect_is_shown_without_the_secret(running: Services) -> None:
    paths = [
        path
        for path, methods in running.request("prefect", "/openapi.json").json()["paths"].items()
        if "get" in methods and "{" not in path
    ]
    assert len(paths) > 10
    answered = {path for path in paths if running.request("prefect", f"/api{path}").status_code != 401}
    assert answered <= {"/health", "/ready"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"command": "touch {place}"},
        {"env": {"PYTHONSTARTUP": "{place}", "PYTHONPATH": "{place}"}},
        {"env.PYTHONPATH": "{place}"},
        {"working_dir": "{place}"},
    ],
)
def test_a_job_takes_no_command_environment_or_folder_even_with_the_secret(
    running: Services, variables: dict[str, object], tmp_path: Path
) -> None:
    filled = json.loads(json.dumps(variables).replace("{place}", str(tmp_path / "touched")))
    path = f"/api/deployments/{running.deployments()['data-refresh']['id']}/create_flow_run"
    refused = running.request("prefect", path, {"job_variables": filled}, auth=running.auth())
    assert refused.status_code == 422
    assert "Additional properties are not allowed" in refused.text


ATTACK = """
<script>
const api = "http://127.0.0.1:PORT/api";
const body = JSON.stringify({job_variables: {command: "touch PLACE"}});
const path = "/deployments/DEPLOYMENT/create_flow_run";
const tries = {
  json: () => fetch(api + path, {method: "POST", body, headers: {"Content-Type": "application/json"}}),
  simple: () => fetch(api + path, {method: "POST", body, mode: "no-cors"}),
  untyped: () => fetch(api + path, {method: "POST", body: new Blob([body]), mode: "no-cors"}),
  withCookies: () => fetch(api + path, {method: "POST", body: new Blob([body]), credentials: "include"}),
  read: () => fetch(api + "/admin/settings"),
  socket: () => new Promise((open, refuse) => {
    const socket = new WebSocket("ws://127.0.0.1:PORT/api/events/out", "prefect");
    socket.onopen = open;
    socket.onerror = refuse;
  }),
};
window.results = (async () => {
  const found = {};
  for (const [name, attempt] of Object.entries(tries)) {
    try {
      const answer = await attempt();
      found[name] = answer.type === "opaque" ? "sent, unread" : `read ${answer.status}`;
    } catch (error) { found[name] = "refused"; }
  }
  return found;
})();
</script>
"""


@pytest.fixture
def foreign_page(running: Services, tmp_path: Path) -> Iterator[str]:
    """A page of another origin that tries to run a command through Prefect."""
    deployment = str(running.deployments()["data-refresh"]["id"])
    replacements = {"PORT": running.ports["prefect"], "PLACE": tmp_path / "touched", "DEPLOYMENT": deployment}
    page = ATTACK
    for name, value in replacements.items():
        page = page.replace(name, str(value))

    with answering(200, page.encode(), "text/html") as address:
        yield f"{address}/"


@pytest.mark.slow
@needs_chromium
def test_a_foreign_page_in_a_browser_runs_nothing(running: Services, foreign_page: str, tmp_path: Path) -> None:
    runs = {"flow_runs": {"deployment_id": {"is_null_": False}, "state": {"type": {"not_any_": ["SCHEDULED"]}}}}
    before = running.ask("prefect", "/api/flow_runs/count", runs)
    rebound = f"--host-resolver-rules=MAP evil.example 127.0.0.1:{foreign_page.split(':')[2].strip('/')}"
    with chromium(rebound) as browser:
        for origin in (foreign_page, "http://evil.example/"):
            page = browser.new_page()
            page.goto(origin)
            found = page.evaluate("window.results")
            assert found == {
                "json": "refused", "simple": "sent, unread", "untyped": "sent, unread", "withCookies": "refused",
                "read": "refused", "socket": "refused",
            }, origin  # fmt: skip
    time.sleep(12)  # the worker asks for work every 10 s
    assert not (tmp_path / "touched").exists()
    assert running.ask("prefect", "/api/flow_runs/count", runs) == before


@pytest.mark.slow
@needs_chromium
def test_prefects_page_opens_with_the_secret_and_asks_no_other_host(running: Services) -> None:
    address = f"http://127.0.0.1:{running.ports['prefect']}"
    asked: list[str] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("input").first.fill(":".join(running.auth()), timeout=30_000)
        page.keyboard.press("Enter")
        page.get_by_text("Active Work Pools").wait_for(timeout=30_000)
    assert [
        url for url in asked if not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))
    ] == []


@pytest.mark.slow
def test_the_secret_is_in_no_log_and_no_command_line(running: Services) -> None:
    _, password = running.auth()
    assert password not in json.dumps([process.cmdline() for process in running.processes()])
    for log in (running.project / "state").rglob("*.log*"):
        assert password not in log.read_text(errors="replace"), log
    assert oct(os.stat(running.project / "state" / "prefect.auth").st_mode & 0o777) == "0o600"
