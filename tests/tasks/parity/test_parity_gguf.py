"""The form in GGUF is compared by our own reader, and by llama.cpp where its server works."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from labelling import compared, edit, exported, stored

from twinloop.common.errors import UserError
from twinloop.models.gguf_form import GGUFLayout
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context
from twinloop.tasks.parity import Release


def llama_like(context: Context, model: Artifact) -> Artifact:
    """The model with a tokenizer that splits text as GPT-2's does, which llama.cpp knows."""

    def write(out: Path) -> None:
        shutil.copytree(model.path, out, dirs_exist_ok=True)
        splitting = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        edit(out / "tokenizer.json", pre_tokenizer=splitting)

    return stored(context, "llama-like", {}, write)


DYING = f"""#!{sys.executable}
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        if self.path != "/completion":
            os._exit(1)
        self.do_GET()
        self.wfile.write(b'{{"tokens": []}}')

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("server", "said"),
    [("#!/bin/sh\nexit 1\n", "llama-server does not start"), (DYING, "llama-server/apply-template:")],
)
def test_a_server_that_fails_is_no_measurement(
    context: Context, data: Artifact, model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    server: str, said: str,
) -> None:  # fmt: skip
    (tmp_path / "llama-server").write_text(server)
    (tmp_path / "llama-server").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=f"^parity: {said}"):
        compared(context, data, Release(llama_like(context, model), {}), "llama.cpp")


def test_a_gguf_file_is_read_back_by_our_own_reader(
    context: Context, data: Artifact, model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = llama_like(context, model)
    release = Release(like, {"fp32": exported(context, like)})
    found = compared(context, data, release, "gguf", "llama.cpp", "merged")
    _, gguf = found.forms[:2]
    assert (gguf.form, gguf.prompt_changes, gguf.stop_changes, gguf.verdict_changes) == ("gguf", 0, 0, 0), gguf.problems
    assert gguf.logit_gap is not None
    assert gguf.logit_gap < 0.1  # its matrices are float16
    assert "no adapter to merge" in found.missing["merged"]
    monkeypatch.setattr(GGUFLayout, "from_gguf", lambda self, values: values)
    fault = compared(context, data, release, "gguf")
    assert (fault.forms[1].logit_gap or 0) > 10 * gguf.logit_gap
    refused = compared(context, data, Release(model, {}), "gguf")
    assert "llama.cpp cannot split text as this tokenizer does" in refused.missing["gguf"]
