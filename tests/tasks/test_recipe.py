"""A wrong recipe is told in one line with file, key and what is allowed, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from twinloop.common.errors import UserError
from twinloop.tasks import runtime
from twinloop.tasks.recipe import ExportSettings, PretrainSettings, load_recipe
from twinloop.tasks.runtime import Runtime

PROJECT = Path(__file__).parents[2]
TINY = (PROJECT / "recipes" / "tiny.yaml").read_text()


@pytest.mark.parametrize("path", sorted(PROJECT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_recipes_of_the_project_are_valid(path: Path) -> None:
    if path.name != "gate.yaml":
        assert load_recipe(path).model.decoder_config(512).num_parameters > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dpo": {"betta": 0.1}}, "dpo.betta: unknown key; did you mean beta?"),
        ({"zzz": 1}, "zzz: unknown key; known here: name, domain, seed"),
        ({"dpo": {"beta": "0.1"}}, "dpo.beta: '0.1': input should be a valid number"),
        ({"dpo": {"beta": 0}}, "dpo.beta: 0: input should be greater than 0"),
        ({"dpo": {"beta": float("inf")}}, "dpo.beta"),
        ({"seed": True}, "seed: True"),
        ({"threads": 1.5}, "threads: 1.5"),
        ({"pretrain": {"tokens": None}}, "pretrain.tokens: None"),
        ({"device": "cdua"}, "device: 'cdua' is not one of 'auto', 'cpu', 'cuda' (did you mean cuda?)"),
        ({"export": {"precisions": ["fp32", "int4"]}}, "export.precisions.1: 'int4' is not one of"),
        ({"rlvr": {"group_size": 1}}, "rlvr.group_size: 1: input should be greater than or equal to 2"),
        ({"sft": {"row_length": 4096}}, "sft: batch_tokens (2048) holds no row"),
        ({"sft": {"row_length": 1024}}, "sft.row_length (1024) is longer than model.max_length (512)"),
        ({"sft": {"warmup": 0.7, "decay": 0.7}}, "together at most 1"),
        ({"rlvr": {"max_new_tokens": 512}}, "leaves no room for a prompt"),
        ({"model": {"num_attention_heads": 4, "num_key_value_heads": 3}}, "must be a multiple of"),
        ({"export": {"precisions": ["bf16"]}}, "export.precisions has bf16, which only CUDA runs"),
        ({"export": {"precisions": ["fp32", "fp16"]}}, "export.precisions has fp16, which only CUDA runs"),
        ({"name": "Bad name"}, "name: 'Bad name'"),
    ],
)
def test_a_mistake_names_file_key_and_what_is_allowed(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    fields = yaml.safe_load(TINY.replace("3e-3", "0.003").replace("1e-3", "0.001").replace("e-4", ".0e-4"))
    for name, value in changes.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError) as raised:
        load_recipe(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a recipe is a mapping"),
        ("- 1", "a recipe is a mapping"),
        ("name: [", "not valid YAML"),
        (TINY + "\nseed: 2\n", 'duplicate key "seed"'),
        ("name: x", "model: missing"),
        (b"name: \xff", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe_is_told(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"recipe\.yaml") as raised:
        load_recipe(path)
    assert said in str(raised.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY)
    recipe = load_recipe(path)
    assert recipe.pretrain.learning_rate == 0.003
    assert recipe.pretrain.tokens == 60_000


def test_one_dial_gives_the_network() -> None:
    recipe = load_recipe(PROJECT / "recipes" / "tiny.yaml")
    for depth in (1, 2, 4, 12, 24, 40):
        config = recipe.model.model_copy(update={"depth": depth, "hidden_size": None}).decoder_config(512)
        assert config.num_hidden_layers == depth
        assert config.num_attention_heads * config.head_dim == config.hidden_size


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_no_gpu_is_here_to_run_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    export = ExportSettings.model_validate({"precisions": [precision]})
    recipe = load_recipe(PROJECT / "recipes" / "returns.yaml").model_copy(update={"device": "auto", "export": export})
    monkeypatch.setattr(runtime, "cuda_is_here", lambda: False)
    with pytest.raises(UserError, match=rf"export\.precisions: {precision} runs on CUDA only.*take fp32 or int8"):
        Runtime.of(recipe)
    monkeypatch.setattr(runtime, "cuda_is_here", lambda: True)
    assert Runtime.of(recipe).device == "cuda"


def test_what_is_derived_is_part_of_a_stages_key() -> None:
    settings = PretrainSettings(tokens=10_000, batch_tokens=1100, row_length=512, learning_rate=0.1)
    assert settings.model_dump(mode="json").items() >= {"rows_per_step": 2, "steps": 9}.items()
