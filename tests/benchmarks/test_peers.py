"""The comparison with peers: all contestants get the same tokens, and ours counts what it trains on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.peer_twinloop import measure
from benchmarks.peers import Contestant, describe, encoded, run, save_untrained
from benchmarks.workload import make_data, prepare
from twinloop.common.errors import UserError
from twinloop.tasks.recipe import load_recipe

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    return prepare(
        load_recipe(PROJECT / "recipes" / "tiny.yaml"), "cpu", make_data(tmp_path_factory.mktemp("peers") / "raw", 0.01)
    )


@pytest.mark.slow
def test_a_peer_reads_the_tokens_that_we_train_on(workload, tmp_path):
    theirs = AutoTokenizer.from_pretrained(save_untrained(workload, "small", tmp_path / "model"))
    record = next(workload.records("preferences"))
    text = encoded(workload, "dpo", record)
    assert theirs(text["prompt"])["input_ids"] == workload.tokenizer.encode_prompt(record["prompt"])
    assert theirs(text["chosen"])["input_ids"] == workload.tokenizer.encode(record["chosen"])


@pytest.mark.slow
def test_each_stage_is_a_job_that_trains(workload, tmp_path):
    model = save_untrained(workload, "small", tmp_path / "model")
    for stage in workload.recipe.train:
        job = describe(workload, stage, model, threads=1, steps=2, folder=tmp_path)
        job["settings"] |= {"steps": 4} if stage.name == "grpo" else {}
        result = measure(json.loads(json.dumps(job)))
        assert result["units"] > 0, stage.name
        assert result["wall_s"] > 0, stage.name
        if stage.name != "grpo":  # whose groups differ in number
            assert job["examples"] >= 1, stage.name


@pytest.mark.parametrize(
    ("script", "said"), [("kill -9 $$", "it ended with code -9"), ("echo a >&2; echo why >&2; exit 1", "why$")]
)
def test_a_contestant_that_fails_is_one_line(script: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^TRL, sft: {said}"):
        run(Contestant("TRL", ["sh", "-c", script], {}, {"method": "sft"}))
