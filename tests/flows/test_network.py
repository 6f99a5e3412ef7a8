"""Nothing calls home: a lifecycle and a served minute reach no address but this machine's own."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from small_project import environment, make_ready_project

STRACE = shutil.which("strace")
SERVED_S = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(STRACE is None, reason="no strace: Debian's package `strace`"),
]

ORDER = {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12}
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')


def traced(project: Path, log: Path, *arguments: str) -> subprocess.Popen[str]:
    """`twinloop` under strace, with its children; `log` gets each call that names an address."""
    calls = ["-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(log)]
    return subprocess.Popen(
        [str(STRACE), *calls, sys.executable, "-m", "twinloop.flows.cli", *arguments],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def addresses(log: Path) -> set[str]:
    return {ipv4 or ipv6 for ipv4, ipv6 in ADDRESS.findall(log.read_text(errors="replace"))}


def foreign(log: Path) -> set[str]:
    found = addresses(log)
    assert found, "not one address: was anything traced?"
    return {address for address in found if not address.startswith("127.") and address != "::1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ready_project(tmp_path_factory.mktemp("project"))


def test_a_lifecycle_reaches_this_machine_only(project: Path, tmp_path: Path) -> None:
    run = traced(project, tmp_path / "strace.log", "run", "recipes/small.yaml")
    stdout, stderr = run.communicate(timeout=400)
    assert run.returncode == 0, stdout + stderr
    assert foreign(tmp_path / "strace.log") == set()


def test_a_served_minute_reaches_this_machine_only(project: Path, tmp_path: Path) -> None:
    serve = traced(project, tmp_path / "strace.log", "serve", "--model", "small", "--port", "0")
    assert serve.stdout is not None
    address = serve.stdout.readline().split()[0]
    until = time.monotonic() + SERVED_S
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        while time.monotonic() < until:
            body = {"order": ORDER, "message": "hello"}
            assert client.post("/v1/decisions", json=body).status_code == 200
            assert client.get("/metrics").status_code == 200
            time.sleep(1)
    # strace passes it on; the answers need no connection of the server's own, so there may be no address at all
    subprocess.run(["pkill", "-TERM", "-P", str(serve.pid)], check=True)
    serve.send_signal(signal.SIGTERM)
    serve.communicate(timeout=60)
    assert {found for found in addresses(tmp_path / "strace.log") if not found.startswith("127.")} <= {"::1"}
