"""/openapi.json is what the server does: schemathesis asks what the description allows, and what it forbids."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from consoles import Registered
from served import ScriptedScheduler, make_app, running
from test_structured import small_engine
from tool_templates import FAMILIES, save_tokenizer

from twinloop.domains.chat import Chat
from twinloop.domains.returns.domain import Returns
from twinloop.serving.engine.scheduler import Scheduler

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


@pytest.mark.parametrize("domain", [Returns(), pytest.param(Chat(), marks=pytest.mark.slow)], ids=["returns", "chat"])
def test_examples_and_edges_of_the_description_are_answered_as_it_says(tmp_path, tokenizer, domain):
    app = make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, domain=domain, releases=Registered())
    with running(app) as client:
        assert_described(client, tmp_path, "--phases", "examples,coverage", "--max-examples", "5")


@pytest.mark.slow
@pytest.mark.parametrize("domain", [Returns(), Chat()], ids=["returns", "chat"])
def test_the_description_is_true_of_a_real_model(tmp_path, engine_scheduler, tokenizer, domain):
    with running(make_app(tmp_path, engine_scheduler, tokenizer, domain=domain)) as client:
        assert_described(client, tmp_path, "--max-examples", "40")


@pytest.mark.slow
def test_the_description_is_true_of_a_server_with_an_administrators_token(tmp_path, tokenizer):
    settings = {"admin_token": "s3cret", "releases": Registered()}
    app = make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, domain=Returns(), **settings)
    with running(app) as client:
        assert_described(client, tmp_path, "--max-examples", "20", headers=["Authorization: Bearer s3cret"])
        assert_described(client, tmp_path, "--phases", "examples,coverage", "--max-examples", "5")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "mistral"])
def test_the_description_is_true_of_a_model_with_tools(tmp_path, family):
    tokenizer = save_tokenizer(FAMILIES[family], tmp_path / "tokenizer")
    scheduler = Scheduler(small_engine(tokenizer, slots=4))
    with running(make_app(tmp_path, scheduler, tokenizer, domain=Chat())) as client:
        assert_described(client, tmp_path, "--include-path", "/v1/chat/completions", "--max-examples", "40")
    scheduler.close(drain=False, timeout_s=20)
