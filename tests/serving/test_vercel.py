"""Vercel's AI SDK, unmodified, on the served model: from npm, where node is and the registry answers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from served import make_app, running
from test_structured import small_engine
from tool_templates import FAMILIES, save_tokenizer

from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine.scheduler import Scheduler

PACKAGES = ["ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "@ai-sdk/openai@3.0.141", "zod@4.6.7"]
SCRIPT = Path(__file__).parent / "vercel" / "ask.mjs"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """In a folder that has the packages."""
    if not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    install = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", *PACKAGES]
    installed = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    if installed.returncode:
        pytest.skip(f"npm cannot install Vercel's AI SDK: {installed.stderr.strip().splitlines()[:1]}")
    return Path(shutil.copy(SCRIPT, tmp_path))


@pytest.mark.slow
def test_the_ai_sdk_chats_streams_calls_and_parses(script: Path, tmp_path: Path) -> None:
    save_tokenizer(FAMILIES["qwen"], tmp_path / "model")
    tokenizer = ChatTokenizer.load(tmp_path / "model")
    scheduler = Scheduler(small_engine(tokenizer, slots=2))
    with running(make_app(tmp_path, scheduler, tokenizer)) as client:
        command = ["node", str(script), f"{client.base_url}/v1"]
        done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=180, check=False)
    scheduler.close(drain=False, timeout_s=20)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["whole"]["text"]
    assert result["stream"] == result["openaiWhole"] == result["openaiStream"] == result["whole"]
    assert result["responses"]["status"] == 404
    assert "openai.chat(model)" in result["responses"]["message"]
    assert result["called"] == result["calledStream"]
    for call in result["called"]:
        assert call["toolName"] == "find"
    assert result["called"]
    assert result["afterTool"] > 0
    for answer in [result["object"], *(call["input"] for call in result["called"])]:
        assert 0 <= answer["days"] <= 400
        assert isinstance(answer["damaged"], bool)
