"""Reward models and classifiers through the whole lifecycle, to a champion that gives scores or labels over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_project import LENIENT, make_ready_project, recipe_fields, twinloop

from twinloop.common.strict_yaml import parse_yaml
from twinloop.flows.init import init_project
from twinloop.models.directory import load_config

pytestmark = pytest.mark.slow

PACKED = {"batch_tokens": 1024, "seq_len": 512}
REWARD = {"method": "reward", "learning_rate": 0.003, **PACKED}
RULES = ("parity_logit_gap", "parity_token_agreement", "parity", "p95_ttft_ms", "memory_gib", "champion_net_loss")


def manifest(project: Path, stage: str) -> dict[str, Any]:
    (path,) = project.glob(f"artifacts/{stage}/[0-9a-f]*/manifest.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content | {"path": path.parent}


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """After a run whose SFT comes behind a reward model, and which ends with another one; what it printed."""
    project = make_ready_project(tmp_path_factory.mktemp("rewarded"))
    sft = {"method": "sft", "learning_rate": 0.001, **PACKED}
    rules = {name: LENIENT[name] for name in RULES} | {"reward_accuracy": 0.0, "reward_hacking_violations": 100_000}
    (project / "recipes" / "reward-gate.yaml").write_text(json.dumps(rules))
    fields = recipe_fields() | {"train": [REWARD, sft, REWARD], "gate": {"rules": "recipes/reward-gate.yaml"}}
    (project / "recipes" / "small.yaml").write_text(json.dumps(fields))
    run = twinloop(project, "run", "recipes/small.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    return project, run.stdout


def test_a_reward_model_is_judged_and_served(rewarded: tuple[Path, str]) -> None:
    project, said = rewarded
    assert "gate: SHIP" in said
    assert "reward_hacking_violations" in said
    asked, answered = said[said.index("promoted: ") :].splitlines()[1:3]
    assert '"role": "assistant"' in asked
    assert set(json.loads(answered)["data"][0]) == {"index", "score"}
    measured = manifest(project, "evaluate")["metrics"]
    assert 0 < measured["cases"] < 40, "a tenth of the preferences"
    assert 0 <= measured["reward_hacking_share"] <= 1


def test_a_stage_after_a_reward_model_starts_from_what_was_before_it(rewarded: tuple[Path, str]) -> None:
    project, _ = rewarded
    first, sft, last = (manifest(project, stage) for stage in ("reward", "sft", "reward-2"))
    assert first["inputs"]["model"] == sft["inputs"]["model"]
    assert last["inputs"]["model"]["digest"] == sft["digest"]
    assert [load_config(each["path"]).kind for each in (first, sft, last)] == ["reward", "text", "reward"]
    assert first["metrics"]["initial_loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_reward_model_is_exported_for_transformers_and_has_no_other_form(rewarded: tuple[Path, str]) -> None:
    project, _ = rewarded
    done = twinloop(project, "export", "champion", "--to", "huggingface", "out")
    assert done.returncode == 0, done.stderr
    card = (project / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification" in card
    assert "AutoModelForSequenceClassification" in done.stdout
    refused = twinloop(project, "export", "champion", "--to", "gguf", "other")
    assert refused.returncode == 2
    assert "gives reward and no text" in refused.stderr


def test_a_stage_that_writes_text_does_not_start_from_a_head(rewarded: tuple[Path, str]) -> None:
    project, _ = rewarded
    fields = recipe_fields() | {"name": "other", "base": {"version": "champion", "model": "small"}}
    (project / "recipes" / "other.yaml").write_text(json.dumps(fields))
    refused = twinloop(project, "run", "recipes/other.yaml")
    assert refused.returncode == 2
    assert "has a head for reward; start from another base" in refused.stderr


def test_a_model_that_writes_text_does_not_follow_a_reward_model_as_champion(rewarded: tuple[Path, str]) -> None:
    project, _ = rewarded
    fields = recipe_fields() | {"train": [{"method": "sft", "learning_rate": 0.001, **PACKED}]}
    (project / "recipes" / "text.yaml").write_text(json.dumps(fields))
    refused = twinloop(project, "run", "recipes/text.yaml")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert (
        "small version 1, the champion, is a reward model and what recipes/text.yaml makes is a model that writes text"
        in refused.stderr
    )
    assert "Traceback" not in refused.stdout + refused.stderr
    assert "✓" not in refused.stdout, "no stage was begun"


def test_a_project_of_a_classifier_ends_with_a_champion_that_labels(tmp_path: Path) -> None:
    project = tmp_path / "mails"
    init_project(project, "classification")
    recipe, params = project / "recipes" / "mails.yaml", project / "params.yaml"
    stage = {"method": "classify", "batch_tokens": 1024, "seq_len": 256, "learning_rate": 0.003}
    fields = {name: value for name, value in parse_yaml(recipe.read_text()).items() if name != "evaluate"}
    recipe.write_text(json.dumps(fields | {"train": [stage]}))
    generated = parse_yaml(params.read_text())["generate"] | {"training": 900, "held_out": 120}
    params.write_text(json.dumps({"recipe": "recipes/mails.yaml", "generate": generated}))
    run = twinloop(project, "run")
    assert run.returncode == 0, run.stdout + run.stderr
    assert '"decision": "billing"' in run.stdout
    again = twinloop(project, "run")
    assert again.returncode == 0
    assert "champion: version 1" in again.stdout
