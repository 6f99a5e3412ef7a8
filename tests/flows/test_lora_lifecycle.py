"""Stages with adapters through the whole lifecycle: merged, then stacked, to a champion that is the merged network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from small_project import make_ready_project, twinloop, write_recipe

from twinloop.models.directory import load_tensors
from twinloop.registry.tracking import Mlruns
from twinloop.training.weights import load_decoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After a run whose SFT merges its adapter; those of DPO and GRPO are stacked on that."""
    project = make_ready_project(tmp_path_factory.mktemp("lora"))
    write_recipe(
        project,
        sft={"lora": {"rank": 4, "merge": True}, "learning_rate": 0.003},
        dpo={"lora": {"rank": 3, "alpha": 6, "rank_stabilised": True}, "learning_rate": 0.003},
        grpo={"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}, "kl_coef": 0.1},
    )
    run = twinloop(project, "run", "recipes/small.yaml")
    assert run.returncode == 0, run.stderr
    assert "gate: SHIP" in run.stdout
    return project


def artifact(project: Path, stage: str) -> Path:
    (manifest,) = project.glob(f"artifacts/{stage}/[0-9a-f]*/manifest.json")
    return manifest.parent


def test_each_stage_keeps_its_adapter_beside_the_base_that_it_is_of(project: Path) -> None:
    sft, dpo, grpo = (artifact(project, stage) for stage in ("sft", "dpo", "grpo"))
    assert (sft / "model.safetensors").exists()
    assert not (sft / "adapter").exists()
    for adapted in (dpo, grpo):
        assert not (adapted / "model.safetensors").exists()
        assert os.path.samefile(adapted / "base" / "model.safetensors", sft / "model.safetensors")
        digest = json.loads((sft / "manifest.json").read_text())["digest"]
        assert json.loads((adapted / "manifest.json").read_text())["metrics"]["adapter_base"] == digest
    ranks = json.loads((grpo / "adapter" / "adapter_config.json").read_text())
    assert {ranks["r"], *ranks["rank_pattern"].values()} == {3, 5}


def test_dpo_started_at_ln_2_and_the_checkpoints_are_registered_with_their_base(project: Path) -> None:
    metrics = json.loads((artifact(project, "dpo") / "manifest.json").read_text())["metrics"]
    assert metrics["initial_loss"] == pytest.approx(0.6931472, abs=1e-6)
    client = Mlruns(project / "mlruns").client
    version = client.get_model_version_by_alias("small-checkpoints", "grpo")
    assert "LoRA in `model/adapter`, of the base in `model/base`: sha256" in (version.description or "")


def test_the_champion_computes_what_the_adapted_network_does(project: Path) -> None:
    from twinloop.serving.engine import Engine

    exported = next(
        manifest.parent
        for manifest in project.glob("artifacts/export/[0-9a-f]*/manifest.json")
        if json.loads(manifest.read_text())["metrics"]["precision"] == "fp32"
    )
    network = load_decoder(artifact(project, "grpo"))
    tokens = list(range(6, 46))
    with torch.no_grad():
        logits = network.logits(network.hidden(torch.tensor([tokens]), torch.arange(40)[None]))[0]
    torch.testing.assert_close(torch.from_numpy(Engine.load(exported).score(tokens)), logits, atol=1e-4, rtol=0)
    before = load_tensors(artifact(project, "sft"))
    assert any((array != before[name]).any() for name, array in load_tensors(artifact(project, "grpo")).items())


def test_run_again_every_stage_is_verified_and_skipped(project: Path) -> None:
    again = twinloop(project, "run", "recipes/small.yaml")
    assert again.returncode == 0, again.stderr
    for stage in ("sft", "dpo", "grpo"):
        assert f"✓ {stage}" in again.stdout
        assert f"{stage} done in" not in " ".join(again.stdout.split())
