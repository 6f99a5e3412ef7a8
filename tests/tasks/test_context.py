"""What is wrong between a recipe and its domain is reported before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from contexts import silent_context
from silent import Silent

from twinloop.common.errors import UserError
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import load_recipe
from twinloop.training.checkpoint import Checkpoint, save

PROJECT = Path(__file__).parents[2]


def test_a_split_key_that_the_domain_has_not_is_refused_by_its_name(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((PROJECT / "recipes" / "tiny.yaml").read_text().replace("order_id", "ordr_id"))
    with pytest.raises(UserError) as raised:
        Context.of(tmp_path, recipe, load_recipe(recipe), Silent())
    assert str(raised.value) == f"{recipe}: validate.split_keys: 'ordr_id' is no split key; did you mean order_id?"


def test_a_folder_of_data_that_is_not_there_is_refused_by_its_setting(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((PROJECT / "recipes" / "tiny.yaml").read_text() + "data: nowhere\n")
    with pytest.raises(UserError) as raised:
        Context.of(tmp_path, recipe, load_recipe(recipe), Silent())
    assert str(raised.value) == f"{recipe}: data: nowhere: no such folder in {tmp_path}"


@pytest.mark.parametrize(
    ("records", "wrong"),
    [
        ("exercise", "no record type 'exercise'; there are corpus, exercises, corpus_heldout, chat, "),
        ("corpus_heldout", "corpus_heldout is not to train on: it is held out"),
        ("chat", "chat has the columns messages, facts; pretrain learns from text"),
    ],
)
def test_records_that_a_method_cannot_learn_from_are_refused(tmp_path: Path, records: str, wrong: str) -> None:
    text = (PROJECT / "recipes" / "tiny.yaml").read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("{method: pretrain,", f"{{method: pretrain, records: {records},"))
    with pytest.raises(UserError) as raised:
        Context.of(tmp_path, recipe, load_recipe(recipe), Silent())
    assert str(raised.value).startswith(f"{recipe}: train[0].records: {wrong}")


def test_a_stage_that_goes_on_from_a_checkpoint_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mlruns").mkdir()
    context = silent_context(tmp_path, "small", dataset_digest=None)

    def stopped(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        save(keep / "checkpoints", Checkpoint(step=7, tensors={}, state={}))
        raise KeyboardInterrupt

    def goes_on(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        return {}

    arguments: dict[str, Any] = {"settings": {}, "inputs": {}, "modules": ("twinloop.common.errors",)}
    with pytest.raises(KeyboardInterrupt):
        context.run("sft", stopped, **arguments)
    assert caplog.messages == []
    context.run("sft", goes_on, **arguments)
    assert caplog.messages == ["sft: an earlier run of it was stopped; it goes on from its checkpoint at step 7"]
