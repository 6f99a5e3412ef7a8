"""Prefect's server, for this machine only: `make up`'s, and one embedded in a run, gone with it however the run dies.

Prefect's own ephemeral server outlives a process that was killed, and holds its database and its output open. The
embedded one waits at the end of a pipe whose other end its parent holds: the kernel closes that, also on kill -9. It
starts while the rest is being imported, and listens from the first moment, so nobody has to try again.

Whoever may ask this server to run a deployment runs commands as the operator: it asks for the project's secret, and
`twinloop.flows.guard` filters every request.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError
from twinloop.common.files import has_space
from twinloop.flows.edge import run_command
from twinloop.flows.environment import prepare_environment
from twinloop.flows.secret import auth_string, prefect_client

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HOST = "127.0.0.1"
HOST_NAMES = (HOST, "localhost")
START_WITHIN_S = 180.0
"""It takes 5 s, 12 s when it makes its database, and longer on a busy machine."""
ASK_WITHIN_S = 10.0
STOP_WITHIN_S = 5.0
DELIVER_WITHIN_S = 30.0


_own: dict[str, subprocess.Popen[bytes]] = {}
"""Servers of this process by their address."""
_shared: set[str] = set()
"""Those of `make up`, which may still be starting."""


@contextmanager
def embedded_server(project: Path) -> Iterator[None]:
    """PREFECT_API_URL names a server of this run's own, unless it names one already. Before Prefect is imported.

    While `make up` runs, its server is taken: two on one SQLite file would wait for each other.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    if url := running_prefect(project):
        _shared.add(url)
        try:
            with prefect_client(project, url):
                yield
        finally:
            _shared.discard(url)
        return
    log = _log(project)
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.create_server((HOST, 0)) as listener, log.open("wb") as output:
        port = listener.getsockname()[1]
        child = subprocess.Popen(
            [*server_command(project, port), "--listener", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for the run, which still has to report its end to the server
        )
    url = f"http://{HOST}:{port}/api"
    _own[url] = child
    try:
        with prefect_client(project, url):
            try:
                yield
            finally:
                _deliver_events(child)
    finally:
        del _own[url]
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def running_prefect(project: Path) -> str | None:
    """The API of the Prefect server that `make up` started, while it runs."""
    import psutil  # a bare device may lack it

    from twinloop.flows.processes import alive

    try:
        process = alive(project, "prefect")
        command = process.cmdline() if process else []
        return f"http://{HOST}:{command[command.index('--port') + 1]}/api"
    except (ValueError, psutil.Error):  # there is none, or no more
        return None


def server_command(project: Path, port: int) -> list[str]:
    """What starts this project's Prefect server; it ends with its process."""
    return [sys.executable, "-m", "twinloop.flows.server", "--project", str(project), "--port", str(port)]


def has_shared_server() -> bool:
    """Whether runs report to a Prefect server that others may use too. Imports Prefect."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    return bool(url) and url not in _own


def wait_until_ready(project: Path) -> None:
    """Return when the server of PREFECT_API_URL answers. Raises UserError when it does not."""
    api = os.environ["PREFECT_API_URL"]
    url, own = f"{api}/health", _own.get(api)
    deadline = time.monotonic() + START_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=ASK_WITHIN_S):
                break
        except OSError as error:
            dead = own is not None and own.poll() is not None
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            # Our own listens before it starts: a refused connection means that it is not there, or not any more.
            refused = isinstance(reason, ConnectionRefusedError) and api not in _shared
            if own and not has_space(project):  # its log could not take the reason
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(_log(project).parent)) from None
            if refused or dead or time.monotonic() > deadline:
                see = f"see {_log(project)}" if own else "start it, or unset PREFECT_API_URL"
                see = "`make down` and `make up` start it anew" if api in _shared else see
                reason = (_last_line(_log(project)) if dead else None) or reason
                raise UserError(f"{url}: Prefect's server does not answer ({reason}); {see}") from None
            time.sleep(0.2)
    if own:
        _give_up_events_soon()


def _give_up_events_soon() -> None:
    """An event is tried ten times otherwise, 7 s in all, and so is each that waits behind it: our own server on this
    machine does not come back."""
    from prefect.events.clients import PrefectEventsClient
    from prefect.events.worker import EventsWorker

    EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=1)


def _deliver_events(server: subprocess.Popen[bytes]) -> None:
    """Return when Prefect has sent the events and log lines that wait in this process. By itself it does so when the
    process ends, which is after the end of our server: an error line for each (3.8)."""
    worker = sys.modules.get("prefect.events.worker")
    if worker is None or server.poll() is not None:
        return
    from prefect.logging.handlers import APILogWorker

    for service in (worker.EventsWorker, APILogWorker):
        service.drain_all(timeout=DELIVER_WITHIN_S)


def _log(project: Path) -> Path:
    return project / "state" / "prefect" / "server.log"


def _last_line(log: Path) -> str | None:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return lines[-1].removeprefix("twinloop: ") if lines else None


def _serve(project: Path, port: int, listener: int | None) -> None:
    """Serve until SIGTERM. listener: a socket that is open already; the server then ends when its input does."""
    import uvicorn

    origins = [f"http://{name}:{port}" for name in HOST_NAMES]
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = auth_string(project)
    os.environ["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(origins)
    if listener is not None:
        os.environ |= {"PREFECT_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1"}
        threading.Thread(target=_end_with_parent, daemon=True).start()
    from twinloop.flows.prefect_database import prepare_prefect_database  # Prefect reads what was set above

    prepare_prefect_database()
    where = {"host": HOST, "port": port} if listener is None else {"fd": listener}
    uvicorn.run(_app(origins), **where, log_level="warning", server_header=False, proxy_headers=False, lifespan="on")


def _app(origins: list[str]) -> ASGIApp:
    from prefect.server.api.server import create_app

    from twinloop.flows.guard import ThisMachineOnly

    # Prefect's pages ask for their analytics' settings at another host even where they are off (3.8).
    reached = " ".join(origins + [origin.replace("http", "ws", 1) for origin in origins])
    policy = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    policy += f"connect-src 'self' {reached}; frame-ancestors 'self'"
    return ThisMachineOnly(create_app(final=True), policy=policy)


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not by sys.stdin: the interpreter would wait for its lock at its own end
        continue
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m twinloop.flows.server")
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--listener", type=int)
    arguments = parser.parse_args()
    project = arguments.project.resolve()
    prepare_environment(project)
    _serve(project, arguments.port, arguments.listener)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
