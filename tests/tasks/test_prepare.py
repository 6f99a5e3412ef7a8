"""What validation found is said on the terminal, whether it was done now or before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from silent import Silent

from twinloop.records.dataset import DataVersion
from twinloop.tasks.context import Context
from twinloop.tasks.prepare import validate_stage
from twinloop.tasks.recipe import Recipe, ValidateSettings, load_recipe


@pytest.fixture
def context(tmp_path: Path) -> Context:
    path = tmp_path / "recipe.yaml"
    stage = {"method": "sft", "batch_tokens": 512, "learning_rate": 0.01}
    path.write_text(json.dumps({"name": "talk", "domain": "chat", "base": {"depth": 2}, "train": [stage]}))
    recipe: Recipe = load_recipe(path, tmp_path)
    return Context.of(tmp_path, path, recipe, Silent())


def test_files_that_nothing_reads_are_named_each_time(
    context: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    for name in ("chat.jsonl", "sft_examples_batch2.jsonl"):
        (data / name).write_text(json.dumps(row) + "\n")
    for number in range(6):
        (data / f"z{number}.csv").touch()
    for _ in range(2):
        caplog.clear()
        validate_stage(context, ValidateSettings(), needed=["chat"], data=DataVersion("0" * 32, data))
        [warning] = caplog.messages
        assert warning.startswith(
            f"ignored files of {data}: sft_examples_batch2.jsonl (no record type has this name), "
        )
        assert warning.endswith("z3.csv (not .jsonl, .parquet, .jsonl.gz or .jsonl.zst), and 2 more")
        assert "\n" not in warning


def test_fields_that_nothing_reads_are_named_each_time(
    context: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "ticket": 7, "by": 1}
    (data / "chat.jsonl").write_text(json.dumps(row) + "\n")
    for _ in range(2):
        caplog.clear()
        validate_stage(context, ValidateSettings(), needed=["chat"], data=DataVersion("0" * 32, data))
        assert caplog.messages == ["fields of chat that nothing reads: by, ticket"]
