"""A version records where its bytes come from, whoever registers them later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contexts import silent_context

from twinloop.registry.artifact import Artifact
from twinloop.registry.tracking import CodeVersion, Mlruns
from twinloop.registry.versions import Registry
from twinloop.tasks.context import Context, Report, Work
from twinloop.tasks.register import Made, register_stage


@pytest.fixture
def context(mlruns: Mlruns) -> Context:
    return silent_context(mlruns.root.parent, "returns", recipe_path=Path("recipes/returns.yaml"))


def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
    (out / "model.onnx").write_text("weights")
    return {"bytes": 7}


@pytest.fixture
def validated(context: Context) -> Artifact:
    def rows(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        return {"rows": 1200.0}

    return context.run("validate", rows, settings={}, inputs={}, modules=("twinloop.records.validated",))


def test_the_commit_is_the_making_runs_and_the_run_names_what_it_made(context: Context, validated: Artifact) -> None:
    exported = context.run("export", work, settings={}, inputs={}, modules=("twinloop.records.validated",))
    later = replace(context, code=CodeVersion("b" * 40, dirty=True))
    skipped = later.run("export", work, settings={}, inputs={}, modules=("twinloop.records.validated",))
    assert skipped.reused
    version = register_stage(later, Made([], [], skipped), data=validated)
    assert version.tags["commit"] == "a" * 40
    assert version.run_id
    assert version.domain == "returns"
    run = context.mlruns.client.get_run(version.run_id)
    assert run.data.tags["twinloop.manifest_digest"] == exported.digest == version.digest
    assert run.data.tags["twinloop.commit"] == "a" * 40


def test_without_mlflows_memory_a_version_has_no_run_and_the_commit_of_its_registration(
    context: Context, validated: Artifact
) -> None:
    exported = context.run("export", work, settings={}, inputs={}, modules=("twinloop.records.validated",))
    lost = replace(exported, manifest=exported.manifest.model_copy(update={"metrics": {"mlflow_run_id": "0" * 32}}))
    later = replace(context, code=CodeVersion("b" * 40))
    version = register_stage(later, Made([], [], lost), data=validated)
    assert version.tags["commit"] == "b" * 40
    assert version.run_id is None


def test_checkpoints_and_precisions_that_are_not_served_are_versions_of_a_model_of_their_own(
    context: Context, validated: Artifact
) -> None:
    def writing(weights: str, **metrics: str) -> Work:
        def write(out: Path, keep: Path, report: Report) -> dict[str, Any]:
            (out / "model.onnx").write_text(weights)
            return dict(metrics)

        return write

    def made(stage: str, weights: str, model: Artifact | str = "base", **metrics: str) -> Artifact:
        modules = ("twinloop.records.validated",)
        inputs = {"model": model}
        return context.run(
            stage, writing(weights, **metrics), settings={"weights": weights}, inputs=inputs, modules=modules
        )

    sft = made("sft", "s")

    version = register_stage(
        context,
        Made(
            checkpoints=[sft, made("dpo", "d", sft)],
            others=[made("export", "o", precision="int8")],
            exported=made("export", "e", precision="fp32"),
            base={"base": "small.gguf", "base_license": "mit"},
        ),
        data=validated,
    )
    assert str(version) == "returns version 1"
    registry = Registry(context.mlruns, "returns")
    assert list(registry.snapshot().versions) == [1]
    found = registry.checkpoints.snapshot()
    assert found.aliases == {"sft": 1, "dpo": 2, "export-int8": 3}
    assert not any(each.servable for each in found.versions.values())
    assert [str(each) for each in registry.lineage(version)[1:]] == [
        "returns-checkpoints version 2", "returns-checkpoints version 1",
    ]  # fmt: skip
    assert version.tags["rows"] == "1,200 rows"
    assert (version.tags["base"], version.tags["base_license"]) == ("small.gguf", "mit")
