"""A GGUF file in llama.cpp's server, here one that answers as llama-server does, from a script."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.evaluation.parity import FormError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.tasks.llama_cpp import LlamaCppForm, find_server

SERVER = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

ANSWERS = json.loads({answers!r})

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({{"status": "ok"}})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.reply(ANSWERS[self.path])

    def reply(self, body):
        if body == "dies":
            os._exit(1)
        if body == "refuses":
            self.send_error(500)
            return
        if body == "half":
            self.wfile.write(b"no HTTP at all\\r\\n\\r\\n")
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_): ...

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What our own reader says of the file."""
    directory = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer(["late", "lost"], 270)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    save_model(directory, config, {}, tokenizer)
    return directory


def serving(described: Path, folder: Path, answers: dict[str, object]) -> LlamaCppForm:
    server = folder / "llama-server"
    server.write_text(SERVER.format(python=sys.executable, answers=json.dumps(answers)))
    server.chmod(0o755)
    return LlamaCppForm(described, "digest", str(server), folder / "model.gguf", threads=1)


@pytest.fixture
def alive(described: Path, tmp_path: Path) -> Iterator[LlamaCppForm]:
    answers = {
        "/apply-template": {"prompt": "user: late"},
        "/tokenize": {"tokens": [5, 6]},
        "/completion": {"tokens": [7, 8], "stop_type": "eos"},
    }
    with closing(serving(described, tmp_path, answers)) as form:
        yield form


def test_prompts_are_those_of_its_own_template_and_answers_end_with_their_stop_token(alive: LlamaCppForm) -> None:
    assert alive.prompt_ids([{"role": "user", "content": "late"}]) == [5, 6]
    assert alive.generate([[5, 6]], 4) == [[7, 8, alive.tokenizer.stop_id]]
    assert alive.logits([5, 6]) is None


@pytest.mark.parametrize(
    ("answer", "said", "failed"),
    [
        ("half", "/completion: ", True),
        ("dies", "/completion: ", True),
        ("refuses", "/completion: ", True),
        ({"content": "x"}, "its answer has no tokens", False),
    ],
)
def test_an_answer_that_is_none_is_one_line(
    described: Path, tmp_path: Path, answer: object, said: str, failed: bool
) -> None:
    broken = closing(serving(described, tmp_path, {"/completion": answer}))
    with broken as form, pytest.raises(UserError, match=said) as raised:
        form.generate([[5, 6]], 4)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, FormError) is failed


def test_messages_that_its_template_refuses_are_no_failure(described: Path, tmp_path: Path) -> None:
    refusing = closing(serving(described, tmp_path, {"/apply-template": "refuses"}))
    with refusing as form, pytest.raises(UserError, match="/apply-template: ") as raised:
        form.prompt_ids([{"role": "user", "content": "late"}])
    assert not isinstance(raised.value, FormError)


def test_a_server_that_ends_at_once_does_not_start(described: Path, tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\nexit 1\n")
    server.chmod(0o755)
    with pytest.raises(FormError, match="does not start on the GGUF file"):
        LlamaCppForm(described, "digest", str(server), tmp_path / "model.gguf", threads=1)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="util-linux is not installed")
def test_a_server_ends_with_what_started_it_however_that_dies(described: Path, tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_text(SERVER.format(python=sys.executable, answers="{}"))
    server.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from twinloop.tasks.llama_cpp import LlamaCppForm\n"
        "form = LlamaCppForm(Path(sys.argv[1]), 'digest', sys.argv[2], Path('model.gguf'), threads=1)\n"
        "print(form._process.pid, flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, described, server], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        command = Path(f"/proc/{pid}/cmdline")
        assert str(server).encode() in command.read_bytes()
        parent.kill()
    while command.exists() and command.read_bytes():  # empty for one that nobody has waited for
        time.sleep(0.05)


def test_without_a_server_on_the_path_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"install llama\.cpp"):
        find_server()
