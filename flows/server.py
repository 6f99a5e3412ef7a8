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
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import UserError

START_WITHIN_S = 180.0
"""It takes 5 s, 12 s when it makes its database, and longer on a busy machine."""
STOP_WITHIN_S = 5.0


@contextmanager
def embedded_server(project: Path) -> Iterator[None]:
    """PREFECT_API_URL names a server of this run's own, unless it names one already. Before Prefect is imported.

    Raises UserError when the server does not come up.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    log = project / "state" / "prefect" / "server.log"
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
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    try:
        yield
    finally:
        del os.environ["PREFECT_API_URL"]
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_until_ready(project: Path) -> None:
    """Return when the server of PREFECT_API_URL answers. Raises UserError when it does not."""
    url = f"{os.environ['PREFECT_API_URL']}/health"
    deadline = time.monotonic() + START_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=max(1.0, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, ConnectionRefusedError):
                log = project / "state" / "prefect" / "server.log"
                raise UserError(f"{url}: Prefect's server does not answer ({error}); see {log}") from None
            time.sleep(0.2)


def _serve(listener: int) -> None:
    import uvicorn

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, fd=listener, log_level="error", lifespan="on")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
