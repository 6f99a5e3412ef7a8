"""The comparison of engines and servers: what its table says, what fails in one line, and that nothing goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processes import call, install
from benchmarks.serving import engine_ours, engines
from benchmarks.serving.client import WORDS, Answer
from benchmarks.serving.engines import engine_rows
from benchmarks.serving.environment import Peers
from benchmarks.serving.goals import LLAMA, Comparison, Goal
from benchmarks.serving.models import MAX_LENGTH, Models
from benchmarks.serving.servers import running
from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.shapes import weight_shapes

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A peers' folder without peers, and a small network in the place of SmolLM2."""
    folder = tmp_path_factory.mktemp("peers")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 8, 600)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=MAX_LENGTH,
    )  # fmt: skip
    random = np.random.default_rng(7)
    weights = {
        name: np.ones(shape, np.float32) if "norm" in name else random.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }
    words = [token for word in WORDS for token in tokenizer.encode(f" {word}")]
    quiet = np.ones((tokenizer.vocab_size, 1), np.float32)
    quiet[np.setdiff1d(np.arange(tokenizer.vocab_size), words)] = 0.01  # it says words: half a character is no text
    weights["model.embed_tokens.weight"] *= quiet
    save_model(folder / "models" / "network", config, weights, tokenizer)
    return folder


def test_a_ratio_is_the_median_of_the_rounds_against_the_best_peer() -> None:
    rates = Comparison("decode", "int8", "tokens/s", [Goal(1.5), Goal(3.0, LLAMA)])
    values = {"twinloop int8": [30, 60, 40], "llama.cpp Q8_0": [10, 40, 10], "ctranslate2 int8": [15, 30, 40]}
    for name, found in values.items():
        for value in found:
            rates.add(name, value)
    *shown, best, llama = rates.rows()
    assert [(row.what, row.value) for row in shown] == [
        ("decode", "40.0"), ("· llama.cpp Q8_0", "10.0"), ("· ctranslate2 int8", "30.0"),
    ]  # fmt: skip
    assert (best.value, best.must_be) == ("2.00", "at least 1.5: yes")
    assert (llama.value, llama.must_be) == ("3.00", "at least 3.0: yes")
    assert "1.50 to 4.00" in llama.setting


def test_less_time_is_a_ratio_above_one() -> None:
    times = Comparison("first token", "int8", "ms", [Goal(1.5)], less=True)
    times.add("twinloop int8", 20.0)
    times.add("llama.cpp Q8_0", 25.0)
    ratio = list(times.rows())[-1]
    assert (ratio.value, ratio.must_be) == ("1.25", "at least 1.5: **no**")


def test_a_goal_without_a_peer_is_not_measured() -> None:
    alone = Comparison("decode", "int8", "tokens/s", [Goal(1.1)], missing={"llama.cpp Q8_0": "no compiler"})
    alone.add("twinloop int8", 1.0)
    _, llama, ratio = alone.rows()
    assert (llama.value, llama.unit) == ("missing", "no compiler")
    assert ratio.must_be == "at least 1.1: not measured"


def test_peers_that_fail_are_shown_with_their_last_words(folder: Path) -> None:
    models = Models(folder / "models", Peers(folder))  # neither its interpreter nor llama.cpp is there
    (models.folder / "q8_0.gguf").touch()
    rows = list(engine_rows("int8", models, cores=[0], rounds=1, lengths=engines.QUICK))
    missing = {row.what: row.unit for row in rows if row.value == "missing"}
    assert set(missing) == {"· llama.cpp Q8_0", "· onnxruntime-genai int8", "· ctranslate2 int8"}
    assert all("No such file" in reason and "\n" not in reason for reason in missing.values()), missing
    ours = [row for row in rows if row.what == engines.decode_key(2, 16)]
    assert float(ours[0].value.replace(",", "")) > 0


def test_our_engine_decodes_behind_prompts_of_the_job(folder: Path) -> None:
    exported = Models(folder / "models", Peers(folder)).exported("fp32")
    job = {"model": str(exported), "threads": 1, "by_cpu": False, "prefill": [16], "decode": [[1, 8], [3, 5]]}
    found = engine_ours.measure(job | {"steps": 2})
    assert set(found) == {"prefill 16", "decode 1 x 8", "decode 3 x 5"}
    assert all(rate > 0 for rate in found.values())


@pytest.mark.slow
def test_an_environment_whose_making_was_interrupted_is_completed(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False)
    python = install(tmp_path, ())
    assert call("pip", [python, "-m", "pip", "--version"]).startswith("pip ")


@pytest.mark.parametrize(
    ("script", "said"), [("exit 3", "code 3, without a word"), ("echo a >&2; echo why >&2", "why")]
)
def test_a_server_that_does_not_start_is_one_line(script: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^llama.cpp: .*{said}$"), running("llama.cpp", ["sh", "-c", script], [0]):
        pass


def test_a_server_is_ended_whatever_happens(folder: Path) -> None:
    exported = Models(folder / "models", Peers(folder)).exported("fp32")
    command = [sys.executable, "-m", "benchmarks.serving.our_server", exported, "--slots", "1"]
    pids = []

    def fail() -> None:
        with running("ours", command, [0]) as server:
            pids.append(server.pid)
            assert server.get("/benchmark/counts")["steps"] == 0
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_an_answer_that_was_cut_off_is_not_whole() -> None:
    assert Answer(status=200, usage={"completion_tokens": 3}).whole
    assert not Answer(status=200).whole
    assert not Answer(status=429).whole


def test_the_whole_table_of_ours(folder: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--ours-only", "--quick", "--rounds", "1", "--cores", "1"]
    command += ["--classes", "int8", "--peers", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    found = {row[0]: row[2] for row in rows[2:]}
    for what in (
        *("prefill 16", "decode 2 x 16", "HTTP, 1 client: first token", "HTTP, 2 clients", "largest gap of a stream"),
        *("· repeated to first", "· tokens a model call", "goodput, 4 clients", "a refused request (429)"),
    ):
        assert float(found[what].replace(",", "")) > 0, what
    assert found["· llama.cpp Q8_0"] == "missing"
