"""A task in one file of the user's own goes through the whole lifecycle, with no edit in Twinloop's packages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from twinloop.flows.init import init_project

ECHO = '''
"""Repeats the word that a visitor says."""

import itertools
import json
import random

from pydantic import BaseModel, ConfigDict, Field

from twinloop.domains.domain import Domain, Verdict

WORDS = ["apple", "bread", "cloud", "dance", "eagle", "flute", "grape", "house", "index", "juice", "knife", "lemon"]


class Params(BaseModel):
    seed: int = 1
    training: int = 600
    held_out: int = 150


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid")

    word: str = Field(description="the word to repeat")
    visitor: int = 1


class Echo(Domain):
    name = "echo"
    params = Params
    facts = Said
    request = Said
    example = {"word": "apple", "visitor": 7}
    max_answer_tokens = 12

    def generate(self, params, out):
        rng = random.Random(params.seed)
        said = [Said(word=word, visitor=n) for word, n in itertools.product(WORDS, range(1000))]
        said = rng.sample(said, params.training + params.held_out)
        prompts = [{"prompt": self.build_prompt(one, []), "facts": one.model_dump()} for one in said]
        known, held_out = prompts[: params.training], prompts[params.training :]
        files = {
            "chat": [
                {"messages": [*one["prompt"], {"role": "assistant", "content": one["facts"]["word"]}]} for one in known
            ],
            "prompts": known,
            "cases": [{"case_id": f"c{n}", "kind": "held_out", **one} for n, one in enumerate(held_out)],
        }
        for name, rows in files.items():
            (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
        return {name: len(rows) for name, rows in files.items()}

    def build_prompt(self, request, passages):
        return [{"role": "user", "content": f"visitor {request.visitor} says {request.word} . repeat"}]

    def verify(self, output, facts):
        return self._verdict(output, output == facts.word)

    def check(self, output, request, passages):
        return self._verdict(output, output == request.word)

    def _verdict(self, output, right):
        return Verdict.of({"parsed": right}, output=output, reasons={} if right else {"parsed": "another word"})

    def gold(self, facts):
        return facts.word

    def wrong(self, gold, facts):
        yield from (("another word", word) for word in WORDS if word != gold)
        yield "empty", ""
        yield "twice", f"{gold} {gold}"


domain = Echo()
'''

RECIPE = """
name: echo
domain: ./echo.py
threads: 1
device: cpu
base: {depth: 2, num_key_value_heads: 2, max_length: 128, qk_norm: true, vocab_size: 400}
train:
  - {method: sft, epochs: 2, batch_tokens: 512, seq_len: 128, learning_rate: 3e-3}
  - {method: grpo, steps: 3, prompts_per_step: 4, group_size: 4, max_new_tokens: 12, learning_rate: 2e-4}
evaluate: {stage_cases: 50, max_new_tokens: 12}
"""

GATE = "{held_out_pass_rate: 0.9, champion_net_loss: 0.05, parity_token_agreement: 0.99, memory_gib: 4}\n"


def command(project: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "twinloop.flows.cli", *arguments]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_TRACKING"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def run(project: Path) -> str:
    done = subprocess.run(
        command(project, "run"),
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stages(output: str, how: str) -> set[str]:
    return set(re.findall(rf"^✓ (\S+)(?: \S+)?\s+{how}", output, re.MULTILINE))


@contextmanager
def served(project: Path) -> Iterator[str]:
    """The address of `twinloop serve`."""
    process = subprocess.Popen(
        command(project, "serve", "--port", "0"),
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                return
        pytest.fail(said)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@pytest.mark.slow
def test_a_task_in_one_file_is_trained_judged_and_served_and_a_new_verifier_reruns_what_it_judged(
    tmp_path: Path,
) -> None:
    project = tmp_path / "echo"
    init_project(project, "returns")
    (project / "recipes" / "echo.yaml").write_text(RECIPE)
    (project / "recipes" / "gate.yaml").write_text(GATE)
    (project / "params.yaml").write_text("recipe: recipes/echo.yaml\ngenerate: {seed: 1}\n")
    dvc = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(dvc.replace("generate returns", "generate ./echo.py\n    deps: [echo.py]"))
    (project / "echo.py").write_text(ECHO)

    first = run(project)
    assert "gate: SHIP" in first
    assert {"sft", "audit", "grpo", "export", "evaluate", "gate"} <= stages(first, "done in")
    with served(project) as address, httpx.Client(base_url=address, timeout=60) as client:
        answer = client.post("/v1/decisions", json={"word": "lemon", "visitor": 3}).json()
        assert (answer["decision"], answer["escalated"]) == ("lemon", False)
        assert client.post("/v1/decisions", json={"order": {}}).status_code == 422
        form = json.dumps(client.get("/openapi.json").json())
        assert "the word to repeat" in form

    stricter = ECHO.replace("output == facts.word)", "output == facts.word and output in WORDS)")
    assert stricter != ECHO
    (project / "echo.py").write_text(stricter)
    second = run(project)
    again, reused = stages(second, "done in"), stages(second, "already done")
    assert {"audit", "grpo", "measure-sft", "measure-grpo", "evaluate", "gate"} <= again
    assert {"tokenize", "sft"} <= reused
    assert again.isdisjoint({"tokenize", "base", "sft"})
