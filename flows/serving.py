"""`twinloop serve`: the champion over HTTP, in this process or in several at one address."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError
from twinloop.flows.edge import run_command
from twinloop.flows.environment import prepare_environment

if TYPE_CHECKING:
    from fastapi import FastAPI

    from twinloop.serving.worker_process import WorkerProcess

KILL_AFTER_S = 5.0
"""A process that should have ended by itself so long ago."""


@dataclass(frozen=True)
class ServeSettings:
    """slots, adapters: of each of the `workers`, which are processes."""

    model: str
    host: str
    port: int
    slots: int
    adapters: int
    workers: int
    cors_origins: list[str]
    deadline_s: float


def serve_champion(project: Path, settings: ServeSettings) -> int:
    """Serve until Ctrl-C or SIGTERM; the first line on stdout is the address."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    if settings.workers > 1:
        return _supervise(project, settings)
    from twinloop.serving.api import run_server

    def answer(app: FastAPI, note: str) -> None:
        run_server(app, settings.host, settings.port, on_ready=lambda address: _show(address, note))

    _serve(project, settings, None, answer)
    return 0


def _supervise(project: Path, settings: ServeSettings) -> int:
    from twinloop.serving.listener import SHUTDOWN_S, address_of, listen
    from twinloop.serving.supervisor import Supervisor

    base = [sys.executable, "-m", "twinloop.flows.serving", str(project), json.dumps(asdict(settings))]
    with listen(settings.host, settings.port) as listener:
        supervisor = Supervisor(
            lambda place: [*base, place], listener, settings.workers, stop_within_s=SHUTDOWN_S + KILL_AFTER_S
        )
        address = address_of(settings.host, listener)
        return supervisor.run(lambda note: _show(address, f"{note}, {settings.workers} processes"))


def _serve(
    project: Path, settings: ServeSettings, process: WorkerProcess | None, answer: Callable[[FastAPI, str], None]
) -> None:
    """Open the champion and let `answer` serve the application, until it returns. It gets what to say of the model."""
    from twinloop.flows.keys import project_keys
    from twinloop.flows.releases import ProjectReleases
    from twinloop.registry.champion import Serving, following_champion, open_champion
    from twinloop.registry.versions import Registry
    from twinloop.serving.access import is_this_machine
    from twinloop.serving.api import create_app

    for name in ("twinloop.registry.champion", "twinloop.serving.named"):
        logging.getLogger(name).setLevel(logging.INFO)
    registry = Registry.of(project, settings.model)
    # As at a SIGTERM: what can be answered is, and who started this process starts another one.
    serving = Serving(settings.slots, settings.adapters, process, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with open_champion(project, settings.model, serving) as manager:
        # An empty token is none: it would accept everybody who sends none.
        token = os.environ.get("TWINLOOP_ADMIN_TOKEN") or None
        app = create_app(
            manager,
            admin_token=token,
            local_admin=is_this_machine(settings.host),
            cors_origins=settings.cors_origins,
            releases=ProjectReleases(project, settings.model),
            keys=project_keys(project),
            deadline_s=settings.deadline_s,
            process=process,
        )
        answers = manager.service.model
        differs = "documents_differ" in manager.degraded()
        note = ", with other documents than it was trained with (`twinloop status`)" if differs else ""
        with following_champion(project, registry, manager, serving):
            answer(app, f"{answers.name} version {answers.version}{note}")
        if manager.service.scheduler.died:
            raise UserError("serve: the model's engine has ended with an error, which the log has; start it again")


def _show(address: str, note: str) -> None:
    print(f"{address}  {note}", flush=True)


def _serve_as_worker() -> None:
    """One of several processes. The arguments: the project, its settings, and what the supervisor hands over."""
    from twinloop.serving.api import serve
    from twinloop.serving.worker_process import WorkerProcess

    project, settings, place = sys.argv[1:]
    prepare_environment(Path(project))
    process = WorkerProcess(place)
    logging.basicConfig(format="%(asctime)s %(levelname)s process %(process)d: %(message)s")

    def answer(app: FastAPI, note: str) -> None:
        serve(app, process.listener, on_ready=lambda: process.ready(note))

    _serve(Path(project), ServeSettings(**json.loads(settings)), process, answer)


if __name__ == "__main__":
    sys.exit(run_command(_serve_as_worker))
