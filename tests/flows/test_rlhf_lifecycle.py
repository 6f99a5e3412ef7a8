"""A reward model and PPO on what it says through the whole lifecycle: who is made of what, from the store to MLflow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_project import make_ready_project, mlflow, recipe_fields, twinloop

from twinloop.registry.artifact import Manifest

pytestmark = pytest.mark.slow

SFT = {"method": "sft", "batch_tokens": 1024, "learning_rate": 0.001}
REWARD = {"method": "reward", "batch_tokens": 1024, "seq_len": 512, "learning_rate": 0.003}
PPO = {
    "method": "ppo", "steps": 4, "epochs": 2, "prompts_per_step": 4, "group_size": 2, "max_new_tokens": 48,
    "learning_rate": 0.0001,
    "rewards": [{"verifier": 1.0}, {"model": "reward", "weight": 0.3, "min_accuracy": 0.0, "max_hacking": 1.0}],
}  # fmt: skip


def write(project: Path, *stages: dict[str, Any]) -> None:
    (project / "recipes" / "small.yaml").write_text(json.dumps(recipe_fields() | {"train": stages}))


def manifests(project: Path, stage: str) -> list[Manifest]:
    """Oldest first."""
    found = [Manifest.read(path) for path in project.glob(f"artifacts/{stage}/[0-9a-f]*/manifest.json")]
    return sorted(found, key=lambda manifest: manifest.created)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_ready_project(tmp_path_factory.mktemp("rlhf"))
    write(project, SFT, REWARD, PPO)
    run = twinloop(project, "run", "recipes/small.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "gate: SHIP" in run.stdout
    assert "of held-out pairs" in run.stdout
    return project


def test_ppo_goes_on_from_the_policy_and_its_key_holds_the_reward_model(project: Path) -> None:
    (sft,), (reward,), (ppo,) = (manifests(project, stage) for stage in ("sft", "reward", "ppo"))
    (export, *_) = manifests(project, "export")
    assert reward.inputs["model"].key == ppo.inputs["model"].key == sft.key
    assert ppo.inputs["settings.rewards[1].model"].digest == reward.digest
    assert export.inputs["model"].key == ppo.key
    assert ppo.metrics["reward"] == pytest.approx(ppo.metrics["verifier"] + 0.3 * ppo.metrics["model_reward"])


def test_the_registry_says_what_each_was_made_from(project: Path) -> None:
    client = mlflow(project)
    versions = {
        stage: client.get_model_version_by_alias("small-checkpoints", stage) for stage in ("sft", "reward", "ppo")
    }
    parents = {stage: version.tags["twinloop.parent"] for stage, version in versions.items()}
    assert parents["reward"] == parents["ppo"] == f"small-checkpoints/{versions['sft'].version}"


def test_run_again_nothing_is_trained_and_another_reward_model_trains_ppo_alone(project: Path) -> None:
    write(project, SFT, REWARD, PPO)
    again = twinloop(project, "run", "recipes/small.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert all(len(manifests(project, stage)) == 1 for stage in ("sft", "reward", "ppo"))
    write(project, SFT, REWARD | {"margin": 0.5}, PPO)
    other = twinloop(project, "run", "recipes/small.yaml")
    assert other.returncode == 0, other.stdout + other.stderr
    assert [len(manifests(project, stage)) for stage in ("sft", "reward", "ppo")] == [1, 2, 2]


def test_a_reward_model_in_a_folder_is_in_the_key_by_its_bytes_and_planned_with(project: Path) -> None:
    made = next(project.glob("artifacts/reward/[0-9a-f]*"))
    shutil.copytree(made, project / "models" / "judge", ignore=shutil.ignore_patterns("manifest.json"))
    paid = PPO | {"rewards": [{"model": "models/judge", "min_accuracy": 0.0, "max_hacking": 1.0}]}
    write(project, SFT, paid)
    planned = twinloop(project, "plan", "recipes/small.yaml")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "ppo" in planned.stdout
    run = twinloop(project, "run", "recipes/small.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    *_, ppo = manifests(project, "ppo")
    read = Manifest.read(project / "artifacts" / "base" / ppo.inputs["settings.rewards[0].model"].key / "manifest.json")
    assert read.inputs["source"].stage is None
    assert "audit" not in ppo.inputs, "the verifier gives no reward"
    assert "verifier" not in ppo.metrics


def test_a_reward_model_that_may_be_hacked_pays_nothing(project: Path) -> None:
    trained = len(manifests(project, "ppo"))
    for model in ("reward", "models/judge"):
        stages = [SFT, REWARD] if model == "reward" else [SFT]
        write(project, *stages, PPO | {"rewards": [{"verifier": 1.0}, {"model": model, "min_accuracy": 0.999}]})
        run = twinloop(project, "run", "recipes/small.yaml")
        assert run.returncode == 2, run.stdout + run.stderr
        assert f"train[{len(stages)}].rewards[1].model: this reward model is not good enough" in run.stderr
        assert "(min_accuracy: 0.999)" in run.stderr
        assert "of the audit's wrong answers score as high as the right one (max_hacking: 0)" in run.stderr
    assert len(manifests(project, "ppo")) == trained


def test_a_folder_without_a_reward_model_is_reported_before_anything_runs(project: Path) -> None:
    policy = next(project.glob("artifacts/sft/[0-9a-f]*")).relative_to(project)
    for folder, said in (("./none", "no such directory"), (str(policy), "holds no reward model; method: reward")):
        write(project, SFT, PPO | {"rewards": [{"model": folder}]})
        run = twinloop(project, "run", "recipes/small.yaml")
        assert run.returncode == 2
        assert "train[1].rewards[0].model: " in run.stderr
        assert said in run.stderr
