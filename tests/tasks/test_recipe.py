"""A wrong recipe is reported in one line with file, key and what is allowed, before anything runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import parse_yaml
from twinloop.tasks import recipe as recipe_module
from twinloop.tasks.recipe import ExportSettings, default_recipe, load_recipe, recipe_of
from twinloop.tasks.space import run_bytes
from twinloop.training.methods.pretrain import Settings as PretrainSettings

PROJECT = Path(__file__).parents[2]
TINY = (PROJECT / "recipes" / "tiny.yaml").read_text()
RECIPES = sorted(path for path in PROJECT.glob("recipes/*.yaml") if not path.name.startswith("gate"))


def fields(**changes: Any) -> dict[str, Any]:
    """tiny.yaml with some settings changed: of sections, and by method of stages."""
    found = parse_yaml(TINY)
    for stage in found["train"]:
        stage.update(changes.pop(stage["method"], {}))
    for name, value in changes.items():
        found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found


def write(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_of_the_project_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for stage in recipe.train:
        written = stage.settings.model_dump(mode="json", exclude_computed_fields=True)
        assert type(stage.settings).model_validate(written) == stage.settings


@pytest.mark.parametrize(
    ("allowed", "fastest", "backward"),
    [("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32"), ("float32", "bfloat16", "float32")],
)
def test_backward_is_rounded_where_the_recipe_allows_it_and_the_cpu_gains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str, fastest: str, backward: str
) -> None:
    monkeypatch.setattr(recipe_module, "fastest_products", lambda: ("onednn", fastest))
    runtime = load_recipe(write(tmp_path, fields(backward=allowed, device="cpu"))).runtime()
    assert (runtime.library, runtime.backward) == ("onednn", backward)


def test_all_linear_is_every_layer_and_the_default(tmp_path: Path) -> None:
    from twinloop.models.adapter_form import TARGETS

    for targets in ({}, {"targets": "all-linear"}):
        settings = load_recipe(write(tmp_path, fields(sft={"lora": {"rank": 4} | targets}))).train[1].settings
        assert settings.lora is not None
        assert settings.lora.form.targets == TARGETS
        assert settings.lora.form.scale == 4.0


REWARD = {"method": "reward", "batch_tokens": 2048, "learning_rate": 1e-3}


def test_a_reward_model_is_named_by_the_stage_before_that_makes_it(tmp_path: Path) -> None:
    *before, grpo = fields()["train"]
    paid = grpo | {"rewards": [{"verifier": 1.0}, {"model": "reward", "weight": 0.3}]}
    stage = load_recipe(write(tmp_path, fields() | {"train": [*before, REWARD, paid]})).train[-1]
    assert stage.earlier == {"rewards[1].model": "reward"}
    assert stage.needs_verifier
    unpaid = load_recipe(write(tmp_path, fields() | {"train": [REWARD, grpo | {"rewards": [{"model": "reward"}]}]}))
    assert not unpaid.train[-1].needs_verifier
    for stages, said in (
        (
            [paid, REWARD],
            "train[0].rewards[1].model: no stage reward makes a reward model before it; a folder",
        ),
        (
            [REWARD, paid | {"rewards": [{"model": "reward-2"}]}],
            "makes a reward model before it; those that do: reward",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            load_recipe(write(tmp_path, fields() | {"train": stages}))


def test_a_stage_with_an_adapter_writes_less(tmp_path: Path) -> None:
    lora = {"lora": {"rank": 2, "targets": ["q_proj"]}}
    adapted = ((), ("dpo",), ("sft", "dpo", "grpo"))
    recipes = [load_recipe(write(tmp_path, fields(**dict.fromkeys(methods, lora)))) for methods in adapted]
    sizes = [run_bytes(recipe, recipe.base.decoder_config(512), tmp_path) for recipe in recipes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dpo": {"betta": 0.1}}, "train[2].betta: unknown key; did you mean beta?"),
        ({"zzz": 1}, "zzz: unknown key; known here: name, domain, seed"),
        ({"dpo": {"beta": "0.1"}}, "train[2].beta: '0.1': input should be a valid number"),
        ({"pretrain": {"record": "exercises"}}, "train[0].record: unknown key; did you mean records?"),
        ({"pretrain": {"records": "data/exercises.jsonl"}}, "train[0].records: not the name of a data file without"),
        ({"sft": {"lora": {"rnk": 4}}}, "train[1].lora.rnk: unknown key; did you mean rank?"),
        ({"sft": {"lora": {"rank": 4, "targets": ["x_proj"]}}}, "train[1].lora.targets[0]: 'x_proj' is not one of"),
        ({"sft": {"lora": {"rank": 4, "targets": []}}}, "train[1].lora.targets: []: list should have at least 1 item"),
        ({"sft": {"lora": 16}}, "train[1].lora: 16: not a mapping; known in it: rank, alpha, targets"),
        ({"sft": {"lora": {"rank": 0}}}, "train[1].lora.rank: 0: input should be greater than or equal to 1"),
        ({"dpo": {"beta": 0}}, "train[2].beta: 0: input should be greater than 0"),
        ({"dpo": {"beta": float("inf")}}, "train[2].beta"),
        ({"dpo": {"loss": "hinge"}}, "train[2].loss: 'hinge' is not one of 'sigmoid', 'ipo'"),
        ({"dpo": {"label_smoothing": 0.5}}, "train[2].label_smoothing: 0.5: input should be less than 0.5"),
        ({"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "train[2]: label_smoothing is a setting of loss sigmoid"),
        ({"seed": True}, "seed: True"),
        ({"threads": 1.5}, "threads: 1.5"),
        ({"pretrain": {"tokens": None}}, "train[0].tokens: None"),
        ({"device": "cdua"}, "device: 'cdua' is not one of 'auto', 'cpu', 'cuda' (did you mean cuda?)"),
        ({"export": {"precisions": ["fp32", "int3"]}}, "export.precisions[1]: 'int3' is not one of"),
        ({"grpo": {"group_size": 1}}, "train[3].group_size: 1: input should be greater than or equal to 2"),
        ({"grpo": {"rewards": []}}, "train[3].rewards: []: list should have at least 1 item"),
        (
            {"grpo": {"rewards": [{"verifier": 1.0, "max_hacking": 0.1}]}},
            "train[3].rewards[0]: min_accuracy and max_hacking are limits of a model",
        ),
        ({"grpo": {"rewards": [{"verifer": 1.0}]}}, "train[3].rewards[0].verifer: unknown key; did you mean verifier?"),
        ({"grpo": {"rewards": [{"verifier": 0}]}}, "train[3].rewards[0].verifier: 0: input should be greater than 0"),
        ({"grpo": {"rewards": [{"verifier": 1, "model": "reward"}]}}, "train[3].rewards[0]: a reward is {verifier:"),
        ({"grpo": {"rewards": [{"verifier": 1, "weight": 2}]}}, "train[3].rewards[0]: weight is that of a model"),
        (
            {"grpo": {"rewards": [{"model": "./a"}, {"model": "./a"}]}},
            "train[3]: rewards: the model ./a is named twice",
        ),
        ({"grpo": {"rewards": [{"verifier": 1}, {"verifier": 1}]}}, "train[3]: rewards: the verifier is named twice"),
        (
            {"grpo": {"rewards": [{"model": "dpo"}]}},
            "train[3].rewards[0].model: no stage dpo makes a reward model",
        ),
        ({"sft": {"seq_len": 4096}}, "train[1]: batch_tokens (2048) holds no row"),
        ({"sft": {"seq_len": 1024}}, "train[1].seq_len (1024) is longer than base.max_length (512)"),
        ({"sft": {"warmup_ratio": 0.7, "decay_ratio": 0.7}}, "together at most 1"),
        ({"grpo": {"max_new_tokens": 512}}, "train[3].max_new_tokens (512) leaves no tokens for a prompt"),
        ({"name": "returns-checkpoints"}, "name: returns-checkpoints: -checkpoints is for the registered model"),
        ({"evaluate": {"max_new_tokens": 512}}, "evaluate.max_new_tokens (512) leaves no tokens for a prompt"),
        ({"base": {"num_attention_heads": 4, "num_key_value_heads": 3}}, "must be a multiple of"),
        (
            {"base": {"depth": 4, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": None}},
            "num_attention_heads (4) gives each head 24 values of hidden_size (96), and it must be a multiple of 16",
        ),
        (
            {"base": {"depth": 1, "hidden_size": 32, "num_attention_heads": 64, "num_key_value_heads": None}},
            "num_attention_heads (64) gives each head 0 values of hidden_size (32), and it must be a multiple of 16",
        ),
        ({"base": {"dept": 4}}, "base.dept: unknown key; did you mean depth?"),
        ({"export": {"adapters": True}}, "export.adapters: the last stage makes no adapter; give it `lora`"),
        (
            {
                "train": [REWARD],
                "export": {"adapters": True},
            },
            "export.adapters: the last stage trains a head, for which an adapter has no place",
        ),
        (
            {"device": "auto", "export": {"adapters": True, "precisions": ["fp16"]}},
            "export.precisions has fp16, and export.adapters runs on CPU only",
        ),
        ({"export": {"precisions": ["bf16"]}}, "export.precisions has bf16, which only CUDA runs"),
        ({"export": {"precisions": ["fp32", "fp16"]}}, "export.precisions has fp16, which only CUDA runs"),
        ({"name": "Bad name"}, "name: 'Bad name'"),
        ({"train": []}, "train: must be a list of stages"),
        ({"train": [], "export": {"adapters": True}}, "train: must be a list of stages"),
        ({"train": {"method": "sft"}}, "train: must be a list of stages"),
        ({"train": [{"epochs": 1}]}, "train[0].method: missing"),
        ({"train": [{"method": "sftt"}]}, "train[0].method: 'sftt' is no ready-made method"),
        ({"train": [{"method": "sftt"}]}, "did you mean sft?"),
        ({"train": [{"method": "./none.py"}]}, "none.py: no such file"),
        ({"train": [{"method": "sft", "batch_tokens": 512}]}, "train[0].learning_rate: missing"),
    ],
)
def test_a_mistake_names_file_key_and_what_is_allowed(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    train = changes.pop("train", None) if "train" in changes else None
    content = fields(**changes)
    if train is not None:
        content["train"] = train
    path = write(tmp_path, content)
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
        (TINY + "\nseed: 2\n", 'found duplicate key "seed"'),
        ("name: x", "base: missing"),
        (b"name: \xff", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe_is_reported(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"recipe\.yaml") as raised:
        load_recipe(path)
    assert said in str(raised.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY)
    settings = load_recipe(path).train[0].settings
    assert isinstance(settings, PretrainSettings)
    assert settings.learning_rate == 0.003
    assert settings.tokens == 60_000


def test_depth_alone_gives_the_network() -> None:
    base = load_recipe(PROJECT / "recipes" / "tiny.yaml").base
    for depth in (1, 2, 4, 12, 24, 40):
        config = base.model_copy(update={"depth": depth, "hidden_size": None}).decoder_config(512)
        assert config.num_hidden_layers == depth
        assert config.num_attention_heads * config.head_dim == config.hidden_size


def test_stages_go_by_their_methods_and_a_second_one_by_its_number(tmp_path: Path) -> None:
    content = fields()
    content["train"] = [content["train"][1], content["train"][2], content["train"][1]]
    recipe = load_recipe(write(tmp_path, content))
    assert [stage.name for stage in recipe.train] == ["sft", "dpo", "sft-2"]


@pytest.mark.parametrize(
    ("methods", "files"),
    [
        (["sft"], {"chat", "cases"}),
        (["pretrain", "sft"], {"corpus", "corpus_heldout", "chat", "cases"}),
        (["dpo", "grpo"], {"preferences", "prompts", "cases"}),
    ],
)
def test_only_the_files_that_its_stages_read_are_asked_for(tmp_path: Path, methods: list[str], files: set[str]) -> None:
    content = fields()
    content["train"] = [stage for stage in content["train"] if stage["method"] in methods]
    assert set(load_recipe(write(tmp_path, content)).record_types) == files


def test_a_stage_may_name_other_records_of_its_methods_form(tmp_path: Path) -> None:
    content = fields()
    exercises, corpus = {**content["train"][0], "records": "exercises"}, content["train"][0]
    content["train"] = [exercises]
    alone = load_recipe(write(tmp_path, content))
    assert set(alone.record_types) == {"exercises", "corpus_heldout", "cases"}
    content["train"] = [exercises, corpus]
    both = load_recipe(write(tmp_path, content))
    assert set(both.record_types) == {"exercises", "corpus", "corpus_heldout", "cases"}
    assert both.plain()["train"]["pretrain"]["records"] == "exercises"
    assert "records" not in both.plain()["train"]["pretrain-2"]
    assert [stage.settings for stage in both.train] == [alone.train[0].settings] * 2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_no_gpu_is_here_to_run_is_reported_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    export = ExportSettings.model_validate({"precisions": [precision]})
    recipe = load_recipe(PROJECT / "recipes" / "returns.yaml").model_copy(update={"device": "auto", "export": export})
    monkeypatch.setattr(recipe_module, "cuda_is_here", lambda: False)
    with pytest.raises(UserError, match=rf"export\.precisions: {precision} runs on CUDA only.*take fp32 or int8"):
        recipe.runtime()
    monkeypatch.setattr(recipe_module, "cuda_is_here", lambda: True)
    assert recipe.runtime().device == "cuda"


def test_what_is_derived_is_part_of_a_stages_key() -> None:
    settings = PretrainSettings(tokens=10_000, batch_tokens=1100, seq_len=512, learning_rate=0.1)
    assert settings.model_dump(mode="json").items() >= {"batch_size": 2}.items()


def test_the_default_recipe_is_the_one_named_in_params_or_else_the_only_one(tmp_path: Path) -> None:
    assert default_recipe(PROJECT) == PROJECT / "recipes" / "returns.yaml"
    (tmp_path / "params.yaml").write_text("{}")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "gate.yaml").write_text("golden_pass_rate: 1\n")
    with pytest.raises(UserError, match=r"which recipe.*none"):
        default_recipe(tmp_path)
    (tmp_path / "recipes" / "mine.yaml").write_text(TINY)
    assert default_recipe(tmp_path) == tmp_path / "recipes" / "mine.yaml"
    (tmp_path / "recipes" / "other.yaml").write_text(TINY)
    with pytest.raises(UserError, match=r"mine\.yaml, other\.yaml"):
        default_recipe(tmp_path)


def test_the_recipe_of_a_model_is_found_by_its_name_and_not_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "params.yaml").write_text("{}")
    (tmp_path / "own_sft.py").write_text("from twinloop.training.methods.sft import RECORDS, Settings, build\n")
    (tmp_path / "recipes" / "first.yaml").write_text(TINY.replace("method: sft", "method: ./own_sft.py"))
    (tmp_path / "recipes" / "gate.yaml").write_text("golden_pass_rate: 1\n")
    monkeypatch.chdir(tmp_path / "recipes")  # a method's file is named from the project's folder
    name = parse_yaml(TINY)["name"]
    assert recipe_of(name, tmp_path).train[0].method.name == "pretrain"
    with pytest.raises(UserError, match="other: no recipe in"):
        recipe_of("other", tmp_path)


def test_a_recipe_is_checked_without_torch_polars_or_onnxruntime() -> None:
    program = f"""
import sys
for name in ("torch", "polars", "pandera", "onnxruntime", "prefect", "mlflow"):
    sys.modules[name] = None  # an import raises
from pathlib import Path
from twinloop.tasks.recipe import load_recipe
load_recipe(Path({str(PROJECT / "recipes" / "returns.yaml")!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
