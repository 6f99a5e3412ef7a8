"""Prefect's server, embedded: started for one run, and gone with it however the run dies.

Prefect's own ephemeral server outlives a process that was killed, and holds its database and its output open. This one
waits at the end of a pipe whose other end its parent holds: the kernel closes that, also on kill -9. It starts while
the rest is being imported, and listens from the first moment, so nobody has to try again.
"""

from __future__ import annotations

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

from models.errors import UserError

START_WITHIN_S = 180.0
"""It takes 5 s, 12 s when it makes its database, and longer on a busy machine."""
ASK_WITHIN_S = 10.0
STOP_WITHIN_S = 5.0


_own: dict[str, subprocess.Popen[bytes]] = {}
"""Servers of this process by their address."""
_adopted: set[str] = set()
"""Those of `make up`, which may still be starting."""


@contextmanager
def embedded_server(project: Path) -> Iterator[None]:
    """PREFECT_API_URL names a server of this run's own, unless it names one already. Before Prefect is imported.

    While `make up` runs, its server is taken: two on one SQLite file would wait for each other.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    from flows.services import running_prefect  # psutil, which a bare device may lack

    if url := running_prefect(project):
        os.environ["PREFECT_API_URL"] = url
        _adopted.add(url)
        try:
            yield
        finally:
            _adopted.discard(url)
            del os.environ["PREFECT_API_URL"]
        return
    log = _log(project)
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener, log.open("wb") as output:
        port = listener.getsockname()[1]
        child = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(listener.fileno())],
            env=os.environ | {"PREFECT_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for the run, which still has to tell the server
        )
    url = os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    _own[url] = child
    try:
        yield
    finally:
        del _own[url]
        del os.environ["PREFECT_API_URL"]
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


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
                return
        except OSError as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            # Our own listens before it starts: a refusal means that nobody is there, or nobody any more.
            refused = isinstance(reason, ConnectionRefusedError) and api not in _adopted
            if refused or (own and own.poll() is not None) or time.monotonic() > deadline:
                see = f"see {_log(project)}" if own else "start it, or unset PREFECT_API_URL"
                see = "`make down` and `make up` start it anew" if api in _adopted else see
                raise UserError(f"{url}: Prefect's server does not answer ({reason}); {see}") from None
            time.sleep(0.2)


def _log(project: Path) -> Path:
    return project / "state" / "prefect" / "server.log"


def _serve(listener: int) -> None:
    import uvicorn

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, fd=listener, log_level="error", lifespan="on")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
