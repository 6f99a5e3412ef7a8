"""/openapi.json is what the server does: schemathesis asks what the description allows, and what it forbids."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import ScriptedScheduler, make_app, running

from twinloop.domains.chat import Chat
from twinloop.domains.returns.domain import Returns

HOOKS = Path(__file__).with_name("openapi_hooks.py")


def assert_described(client, folder, *options, headers=()):
    """Run schemathesis against a running server, its caches in `folder`. Its report is the message of a failure."""
    given = [argument for header in headers for argument in ("-H", header)]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json", "--no-color"]
    command += ["--seed", "7", "--exclude-checks", "positive_data_acceptance", *given, *options]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS), "NO_PROXY": "127.0.0.1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("domain", [Returns(), Chat()], ids=["returns", "chat"])
def test_examples_and_edges_of_the_description_are_answered_as_it_says(tmp_path, tokenizer, domain):
    with running(make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, domain=domain)) as client:
        assert_described(client, tmp_path, "--phases", "examples,coverage", "--max-examples", "5")


@pytest.mark.slow
@pytest.mark.parametrize("domain", [Returns(), Chat()], ids=["returns", "chat"])
def test_the_description_is_true_of_a_real_model(tmp_path, engine_scheduler, tokenizer, domain):
    with running(make_app(tmp_path, engine_scheduler, tokenizer, domain=domain)) as client:
        assert_described(client, tmp_path, "--max-examples", "40")


@pytest.mark.slow
def test_the_description_is_true_of_a_server_with_an_administrators_token(tmp_path, tokenizer):
    app = make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, domain=Returns(), admin_token="s3cret")
    with running(app) as client:
        assert_described(client, tmp_path, "--max-examples", "20", headers=["Authorization: Bearer s3cret"])
        assert_described(client, tmp_path, "--phases", "examples,coverage", "--max-examples", "5")
