"""A GGUF file in llama.cpp's own server, asked over HTTP: its tokenizer, its template, its greedy answers.

It tells no logits of a given text, so tokens are compared up to the first that differs.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from twinloop.common.errors import UserError, one_line
from twinloop.evaluation.parity import Form, FormError
from twinloop.evaluation.parity_report import LLAMA_CPP

SERVER = "llama-server"
STARTS_WITHIN_S = 120.0
ANSWERS_WITHIN_S = 300.0
_TEMPLATE = "/apply-template"


def find_server() -> str:
    """Raises UserError where it is not on the path."""
    if found := shutil.which(SERVER):
        return found
    raise UserError(f"{SERVER} is not on the path; install llama.cpp to compare what it answers")


class LlamaCppForm(Form):
    """The server runs as long as this object is used."""

    def __init__(self, directory: Path, digest: str, server: str, path: Path, *, threads: int):
        """directory: the file's tokenizer as we read it. Raises FormError where the server does not start on it."""
        super().__init__(LLAMA_CPP, directory, digest)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [server, "-m", str(path), "--host", "127.0.0.1", "--port", str(port), "--jinja", "-t", str(threads)]
        no = subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                [*_ending_with_us(), *command, "-np", "1", "-ngl", "0"], stdin=no, stdout=no, stderr=no
            )
        except OSError as error:
            raise FormError(f"{server}: does not run ({error.strerror})") from None
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.kill()  # it holds nothing that is worth an orderly end
        self._process.wait()

    def logits(self, tokens: Sequence[int]) -> None:
        return None

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """By its own template and tokenizer."""
        text = self._ask(_TEMPLATE, "prompt", messages=list(messages))
        ids: list[int] = self._ask("/tokenize", "tokens", content=text, add_special=False, parse_special=True)
        return ids

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        return [self._answer(prompt, max_tokens) for prompt in prompts]

    def _answer(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        asked = {"n_predict": max_tokens, "temperature": 0.0, "return_tokens": True, "cache_prompt": False}
        found = self._post("/completion", prompt=list(prompt), **asked)
        tokens: list[int] = _field(found, "/completion", "tokens")
        shown = bool(tokens) and tokens[-1] in self.tokenizer.stop_ids
        return [*tokens, self.tokenizer.stop_id] if found.get("stop_type") == "eos" and not shown else tokens

    def _wait(self) -> None:
        until = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5):
                    return
            except (OSError, HTTPException):  # it does not listen yet, or loads
                time.sleep(0.1)
        raise FormError(f"{SERVER} does not start on the GGUF file; try it yourself on what `twinloop export` writes")

    def _ask(self, path: str, field: str, **body: Any) -> Any:
        return _field(self._post(path, **body), path, field)

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWERS_WITHIN_S) as answer:
                content: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            # A template's refusal has the status 500 too.
            failed = error.code >= 500 and path != _TEMPLATE
            raise (FormError if failed else UserError)(f"{SERVER}{path}: {one_line(error)}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise FormError(f"{SERVER}{path}: {one_line(error)}; run it again") from error
        return content


def _ending_with_us() -> list[str]:
    """How a command begins whose process the kernel kills once the thread that started it has ended, however that
    dies: where util-linux is, on Linux."""
    found = shutil.which("setpriv")
    return [found, "--pdeathsig", "KILL"] if found else []


def _field(answer: Mapping[str, Any], path: str, field: str) -> Any:
    if field not in answer:
        raise UserError(f"{SERVER}{path}: its answer has no {field}; take a newer llama.cpp")
    return answer[field]
