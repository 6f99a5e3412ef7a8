"""The champion at work: over HTTP, for one order, or as the proof at the end of a lifecycle."""

from __future__ import annotations

import http.client
import json
import logging
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinloop.common.errors import UserError
from twinloop.registry.smoke_test import EXAMPLE_MESSAGE, EXAMPLE_ORDER

START_WITHIN_S = 120.0
ANSWER_WITHIN_S = 60.0
STOP_WITHIN_S = 20.0


@dataclass(frozen=True)
class Answer:
    """What the server said to one order."""

    order: Mapping[str, Any]
    body: Mapping[str, Any]


def serve_champion(project: Path, model: str, *, host: str, port: int, slots: int) -> int:
    """Serve until Ctrl-C or SIGTERM; the first line on stdout is the address."""
    from twinloop.registry.champion import following_champion, open_champion
    from twinloop.registry.tracking import Mlruns
    from twinloop.registry.versions import Registry
    from twinloop.serving.access import is_this_machine
    from twinloop.serving.api import create_app, run_server

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("twinloop.registry.champion").setLevel(logging.INFO)
    registry = Registry(Mlruns(project / "mlruns"), model)
    with open_champion(project, model, slots=slots) as manager:
        # An empty token is none: it would let everybody in who sends none.
        token = os.environ.get("TWINLOOP_ADMIN_TOKEN") or None
        app = create_app(manager, admin_token=token, local_admin=is_this_machine(host))

        def ready(address: str) -> None:
            answers = manager.service.model
            print(f"{address}  {answers.name} version {answers.version}", flush=True)

        with following_champion(registry, manager, slots=slots):
            run_server(app, host, port, on_ready=ready)
    return 0


def decide_once(project: Path, model: str, order: Mapping[str, Any], message: str) -> int:
    """Print the decision on one order as JSON; 1 when it is escalated."""
    from pydantic import ValidationError

    from twinloop.domains.returns.prompt import Order
    from twinloop.registry.champion import open_champion

    try:
        checked = Order(**order)
    except ValidationError as error:
        problem = error.errors()[0]
        option = {"days_since_delivery": "days"}.get(str(problem["loc"][0]), str(problem["loc"][0]).replace("_", "-"))
        told = (
            Order.model_fields[str(problem["loc"][0])].description
            or problem["msg"].removeprefix("Input should be ").lower()
        )
        raise UserError(f"--{option} {problem['input']!r}: must be {told}") from None
    with open_champion(project, model, slots=1) as champion:
        response = champion.service.decide(checked, message)
    print(response.model_dump_json(indent=2))
    return 1 if response.escalated else 0


def answer_over_http(project: Path, model: str) -> Answer:
    """Start the server as a user would, ask it about order A10234, stop it. Raises UserError where no answer comes."""
    server = subprocess.Popen(
        [sys.executable, "-m", "twinloop.flows.cli", "serve", "--model", model, "--port", "0"],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # A server that hangs is ended, and then its pipes end too, which is what reading them waits for.
    too_late = threading.Timer(START_WITHIN_S, server.kill)
    too_late.start()
    try:
        assert server.stdout is not None
        assert server.stderr is not None
        address = server.stdout.readline().split(maxsplit=1)
        too_late.cancel()
        if not address:
            said = server.stderr.read().strip().splitlines()
            last = said[-1].removeprefix("twinloop: ") if said else f"no address within {START_WITHIN_S:.0f} s"
            raise UserError(f"serve: {last}")
        return Answer(EXAMPLE_ORDER, _ask(address[0]))
    finally:
        too_late.cancel()
        server.terminate()
        try:
            server.communicate(timeout=STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


def _ask(address: str) -> dict[str, Any]:
    body = json.dumps({"order": EXAMPLE_ORDER, "message": EXAMPLE_MESSAGE}).encode()
    request = urllib.request.Request(f"{address}/v1/decisions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as response:
            answer: dict[str, Any] = json.load(response)
    except (OSError, http.client.HTTPException, ValueError) as error:  # HTTPError and a timeout are OSErrors
        raise UserError(f"{request.full_url}: no answer ({' '.join(str(error).split())})") from None
    return answer
