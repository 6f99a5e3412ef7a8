"""A stage that reads another model, such as a teacher: found and checked before anything runs, and part of its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from silent import Silent
from small_models import TEXT, write_model

from twinloop.common.errors import UserError
from twinloop.models.directory import load_config
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.records.dataset import DataVersion
from twinloop.registry.artifact import Artifact
from twinloop.tasks.base_source import resolve_models
from twinloop.tasks.context import Context
from twinloop.tasks.imported_base import import_models, import_stage
from twinloop.tasks.prepare import validate_stage
from twinloop.tasks.recipe import Recipe, load_recipe
from twinloop.tasks.train import train
from twinloop.training.runtime import Runtime

STAGE = {"method": "distil", "learning_rate": 0.01, "batch_tokens": 128, "seq_len": 64, "top_k": 4}
SFT = {"method": "sft", "learning_rate": 0.01, "batch_tokens": 128, "seq_len": 64}
REWARD_STAGE = SFT | {"method": "reward"}
GRPO = {
    "method": "grpo", "learning_rate": 0.01, "steps": 1, "prompts_per_step": 1, "group_size": 2, "max_new_tokens": 8
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    turns = [{"role": "user", "content": "which order?"}, {"role": "assistant", "content": TEXT}]
    rows = [{"messages": [*turns[:-1], {**turns[-1], "content": f"{TEXT} {n}"}]} for n in range(8)]
    (tmp_path / "data" / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(tmp_path / "models" / "student", seed=1)
    write_model(tmp_path / "models" / "teacher", seed=2)
    return tmp_path


def read(project: Path, teacher: Any = None) -> Recipe:
    return read_stages(project, STAGE | {"teacher": {"path": "models/teacher"} if teacher is None else teacher})


def read_stages(project: Path, *stages: dict[str, Any]) -> Recipe:
    base = {"path": "models/student"}
    fields = {"name": "small", "domain": "chat", "base": base, "evaluate": {"max_new_tokens": 16}, "train": stages}
    (project / "recipe.yaml").write_text(json.dumps(fields))
    return load_recipe(project / "recipe.yaml", project)


def trained(project: Path) -> tuple[Artifact, Artifact]:
    """The teacher as it was read, and the student."""
    recipe = read(project)
    context = Context.of(project, project / "recipe.yaml", recipe, Silent()).on_data("0" * 32)
    base, named = resolve_models(recipe, project)
    version = DataVersion("0" * 32, project / "data")
    data = validate_stage(context, recipe.validate_, needed=["chat"], data=version)
    start = import_stage(context, base)
    models = import_models(context, named, start=start)["distil"]
    runtime = Runtime(seed=1, threads=1)
    student = train.fn(context, recipe.train[0], runtime, data=data, model=start, audit=None, named=models)
    return models["teacher"], student


def test_the_teacher_is_read_and_its_bytes_are_part_of_the_key(project: Path) -> None:
    teacher, student = trained(project)
    assert student.manifest.inputs["settings.teacher"].digest == teacher.digest
    assert student.metrics["loss"] > 0
    assert student.manifest.settings["teacher"] == {"path": "models/teacher"}
    assert trained(project)[1].reused
    write_model(project / "models" / "teacher", seed=3)
    other, again = trained(project)
    assert not again.reused
    assert other.digest != teacher.digest
    assert again.key != student.key


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"path": "models/none"}, "train[0].teacher: "),
        ({"version": "champion"}, "train[0].teacher: "),
        ({"depth": 2}, "train[0].teacher: depth makes a new network; {path: ...}"),
        ({}, "train[0].teacher: does not say which model"),
        ({"pth": "models/teacher"}, "train[0].teacher.pth: unknown key; did you mean path?"),
        ({"path": "models/teacher", "adaptor": "a"}, "train[0].teacher.adaptor: unknown key; did you mean adapter?"),
        ("models/none", "models/none: no such directory or file"),
        ("sft", "train[0].teacher: no stage sft makes a model that writes text before it; a folder is named as ./sft"),
        ({"stage": "distil"}, "train[0].teacher: no stage distil makes a model that writes text before it"),
        (["models/teacher"], "train[0].teacher: ['models/teacher'] names no model"),
    ],
)
def test_a_mistake_in_it_is_one_line_before_anything_runs(project: Path, teacher: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        resolve_models(read(project, teacher), project)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (project / "artifacts").exists()


def test_a_model_may_be_named_by_the_stage_that_makes_it(project: Path) -> None:
    recipe = read_stages(
        project, SFT, REWARD_STAGE, STAGE | {"teacher": "sft"}, GRPO | {"rewards": [{"model": "reward"}]}
    )
    assert [stage.earlier for stage in recipe.train] == [{}, {}, {"teacher": "sft"}, {"rewards[0].model": "reward"}]
    assert resolve_models(recipe, project)[1] == {}, "nothing of it is there yet"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [SFT | {"method": "classify"}, GRPO | {"rewards": [{"model": "classify"}]}],
            "no stage classify makes a reward",
        ),
        ([REWARD_STAGE, STAGE | {"teacher": "reward"}], "no stage reward makes a model that writes text before it"),
        ([SFT, GRPO | {"rewards": [{"model": "./models/teacher"}]}], "models/teacher holds no reward model"),
        ([SFT, STAGE | {"teacher": "./models/judge"}], "models/judge has a head and writes no text"),
    ],
)
def test_a_model_of_another_kind_is_refused(project: Path, stages: list[dict[str, Any]], said: str) -> None:
    write_model(project / "models" / "judge", seed=3, reward=True)
    with pytest.raises(UserError, match=r"train\[1\]\.(teacher|rewards\[0\]\.model): ") as raised:
        resolve_models(read_stages(project, *stages), project)
    assert said in str(raised.value)


def test_a_reward_model_in_a_folder_is_imported_with_its_head_and_its_own_tokenizer(project: Path) -> None:
    write_model(project / "models" / "judge", seed=3, text="quite another text", positions=64, reward=True)
    recipe = read_stages(project, GRPO | {"rewards": [{"verifier": 1.0}, {"model": "models/judge"}]})
    context = Context.of(project, project / "recipe.yaml", recipe, Silent()).on_data("0" * 32)
    base, named = resolve_models(recipe, project)
    read = import_models(context, named, start=import_stage(context, base))["grpo"]["rewards[1].model"]
    assert load_config(read.path).kind == "reward"
    placed = recipe.train[0].settings.with_models({"rewards[1].model": read.path})
    assert placed.rewards[1].model == {"path": str(read.path)}
    assert ChatTokenizer.load(read.path).token_bytes == ChatTokenizer.load(project / "models" / "judge").token_bytes


def test_a_teacher_of_fewer_tokens_is_refused(project: Path) -> None:
    write_model(project / "models" / "teacher", seed=2, positions=64)
    with pytest.raises(UserError, match=r"takes 64 tokens, and base\.max_length is 128"):
        resolve_models(read(project), project)


def test_another_tokenizer_is_refused_before_training(project: Path) -> None:
    write_model(project / "models" / "teacher", seed=2, text="quite another text, another text")
    with pytest.raises(UserError, match="another tokenizer than the base") as raised:
        trained(project)
    assert "\n" not in str(raised.value)
    assert not (project / "artifacts" / "distil").exists()
    ours, theirs = (ChatTokenizer.load(project / "models" / name) for name in ("student", "teacher"))
    assert ours.vocab_size != theirs.vocab_size or ours.token_bytes != theirs.token_bytes
