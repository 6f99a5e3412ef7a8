"""The champion in use: for one request, or asked over HTTP at the end of a lifecycle."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinloop.common.errors import UserError

LONGEST_PATH = 4096
START_WITHIN_S = 120.0
ANSWER_WITHIN_S = 60.0
STOP_WITHIN_S = 20.0


@dataclass(frozen=True)
class Answer:
    """The server's answer to the example of the model's domain."""

    request: Mapping[str, Any]
    body: Mapping[str, Any]


def decide_once(project: Path, model: str, text: str | None) -> int:
    """Print the decision on one request as JSON; 1 when it is escalated. text: the request as JSON; "-" reads stdin."""
    from pydantic import ValidationError

    from twinloop.domains.examples import example_request
    from twinloop.models.directory import load_config
    from twinloop.registry.champion import Serving, load_served_domain, open_champion
    from twinloop.registry.versions import CHAMPION, Registry
    from twinloop.serving.errors import describe_validation, field_descriptions

    version = Registry.of(project, model).find(CHAMPION)
    domain = load_served_domain(version, project).domain
    if load_config(version.path).kind == "reward":
        raise UserError(f"{model}: its champion is a reward model; `twinloop serve` and ask /v1/classify for scores")
    if domain.request is None:
        raise UserError(f"{model}: its domain, {domain.name}, makes no decisions; `twinloop serve` and chat with it")
    example = f"such as '{json.dumps(example_request(domain))}'"
    if text is None:
        raise UserError(f"--json: is required: the request, or - for what comes on stdin; {example}")
    try:
        request = domain.request.model_validate_json(sys.stdin.buffer.read() if text == "-" else text)
    except ValidationError as error:
        problem, _ = describe_validation(error.errors(), field_descriptions(domain.request))
        if text != "-" and len(text) < LONGEST_PATH and Path(text).is_file():
            raise UserError(f"--json: {text} is a file, and the request is wanted: --json - < {text}") from None
        raise UserError(f"--json: {problem}; {example}") from None
    with open_champion(project, model, Serving(slots=1)) as champion:
        response = champion.service.decide(request)
    print(response.model_dump_json(indent=2))
    return 1 if response.escalated else 0


def answer_over_http(project: Path, model: str) -> Answer:
    """Start the server as a user would, ask it the example of its domain, stop it. Raises UserError where no answer
    comes."""
    token = secrets.token_urlsafe(32)  # of this server alone, which may have API keys that nobody here knows
    server = subprocess.Popen(
        [sys.executable, "-m", "twinloop.flows.cli", "serve", "--model", model, "--port", "0"],
        cwd=project,
        env=os.environ | {"TWINLOOP_ADMIN_TOKEN": token},
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
        return _ask(address[0], *_example(project, model), token=token)
    finally:
        too_late.cancel()
        server.terminate()
        try:
            server.communicate(timeout=STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


def _example(project: Path, model: str) -> tuple[str, dict[str, Any]]:
    """Where the champion is asked, and what."""
    from twinloop.models.directory import load_config
    from twinloop.registry.champion import load_served_domain
    from twinloop.registry.smoke_test import example_call
    from twinloop.registry.versions import CHAMPION, Registry

    champion = Registry.of(project, model).find(CHAMPION)
    return example_call(load_served_domain(champion, project).domain, load_config(champion.path).labels)


def _ask(address: str, route: str, body: dict[str, Any], *, token: str) -> Answer:
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{address}{route}", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as response:
            return Answer(body, json.load(response))
    except (OSError, http.client.HTTPException, ValueError) as error:  # HTTPError and a timeout are OSErrors
        raise UserError(f"{request.full_url}: no answer ({' '.join(str(error).split())})") from None
