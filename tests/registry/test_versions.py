"""The registry keeps what it promises: the same bytes, once, with their origin, or a clear no."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Artifact
from twinloop.registry.snapshot import Version, VersionName
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import Lineage, Registry

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "twinloop.registry.promotion"])

Make = Callable[..., Artifact]
Export = Callable[[str], Version]


def test_every_stage_becomes_a_version_with_its_lineage(registry: Registry, make: Make, lineage: Lineage) -> None:
    checkpoints = registry.checkpoints
    pretrained = checkpoints.register(make("pretrain", "a").path, lineage, run_id=None)
    after_pretraining = replace(lineage, parent=VersionName(pretrained.name, pretrained.version))
    tuned = checkpoints.register(make("sft", "b").path, after_pretraining)
    after_tuning = replace(lineage, parent=VersionName(tuned.name, tuned.version))
    exported = registry.register(make("export", "c").path, after_tuning, servable=True)
    assert [v.stage for v in registry.lineage(exported)] == ["export", "sft", "pretrain"]
    assert exported.version == 1  # what can be served counts by itself
    assert exported.tags["parent"] == "returns-checkpoints/2"
    assert exported.tags["dataset_digest"] == lineage.dataset_digest
    assert exported.tags["commit"] == lineage.code.commit
    assert exported.tags["recipe"] == "recipes/returns.yaml"
    assert exported.domain == registry.resolve("candidate").domain == "returns"
    assert registry.snapshot().aliases == {"candidate": exported.version}


def test_an_artifact_is_registered_once(registry: Registry, make: Make, lineage: Lineage) -> None:
    first = registry.register(make().path, lineage, servable=True)
    again = registry.register(make().path, lineage, servable=True)
    assert first == again
    assert len(registry.snapshot().versions) == 1
    models = registry.mlruns.root / "artifacts" / "returns" / "models"
    assert len(list(models.iterdir())) == 1


def test_the_same_bytes_for_another_domain_are_another_version(
    registry: Registry, make: Make, lineage: Lineage
) -> None:
    first = registry.register(make().path, lineage, servable=True)
    other = registry.register(make().path, replace(lineage, domain="./tickets.py"), servable=True)
    assert (other.version, other.domain, first.domain) == (2, "./tickets.py", "returns")


def test_a_version_without_a_domain_says_how_to_give_it_one(registry: Registry, make: Make, lineage: Lineage) -> None:
    version = registry.register(make().path, lineage, servable=True)
    registry.mlruns.client.delete_model_version_tag("returns", str(version.version), "twinloop.domain")
    with pytest.raises(
        UserError, match=r"returns version 1: the registry does not name its domain; .* tag twinloop.domain"
    ):
        assert registry.version(1).domain


def _register_and_die(artifact: Path, root: Path, lineage: Lineage, call: str, last: bool) -> None:
    """Register, and be killed when a method of MLflow's client is called, or when it has been."""
    registry = Registry(Mlruns(root), "returns")
    method = getattr(registry.mlruns.client, call)

    def dying(*arguments: object, **options: object) -> None:
        if last:
            method(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(registry.mlruns.client, call, dying)
    registry.register(artifact, lineage, servable=True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("call", ["create_logged_model", "finalize_logged_model", "create_model_version"])
def test_what_a_process_killed_while_it_registered_left_is_removed_by_the_next(
    registry: Registry, make: Make, lineage: Lineage, call: str, last: bool
) -> None:
    arguments = (make("export", "w1").path, registry.mlruns.root, lineage, call, last)
    process = processes.Process(target=_register_and_die, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    for weights in ("w1", "w2"):
        registry.register(make("export", weights).path, lineage, servable=True)
    versions = registry.snapshot().versions.values()
    assert len(versions) == 2
    models = registry.mlruns.root / "artifacts" / "returns" / "models"
    assert {path / "artifacts" / "model" for path in models.iterdir()} == {version.path for version in versions}
    found = registry.mlruns.client.search_logged_models([registry.mlruns.experiment_id("returns")])
    assert {model.model_id for model in found} == {version.path.parents[1].name for version in versions}
    assert {str(model.status) for model in found} == {"READY"}


def test_resolve_gives_the_verified_exported_model(registry: Registry, exported: Export) -> None:
    version = exported("w1")
    served = registry.resolve("candidate")
    assert (served.version, served.digest) == (version.version, version.digest)
    assert (served.path / "model.onnx").read_text() == "w1"


def test_mlflow_itself_finds_the_files_of_a_version(registry: Registry, exported: Export) -> None:
    version = exported("w1")
    client = registry.mlruns.client
    uri = client.get_model_version_download_uri("returns", str(version.version))
    assert uri == version.path.parent.as_uri()
    found = client.get_model_version_by_alias("returns", "candidate")
    assert found.tags["twinloop.manifest_digest"] == version.digest


def test_cleaning_artifacts_takes_nothing_from_the_registry(registry: Registry, make: Make, lineage: Lineage) -> None:
    exported, checkpoint = make("export"), make("sft", "w2")
    served = registry.register(exported.path, lineage, servable=True)
    kept = registry.register(checkpoint.path, lineage)
    shutil.rmtree(exported.path.parents[1])
    assert registry.resolve("candidate").version == served.version
    assert registry.verify(kept).version == kept.version


def test_an_exported_model_is_copied_and_a_checkpoint_linked(registry: Registry, make: Make, lineage: Lineage) -> None:
    exported, checkpoint = make("export"), make("sft", "w2")
    served = registry.register(exported.path, lineage, servable=True)
    kept = registry.register(checkpoint.path, lineage)
    assert not (served.path / "model.onnx").samefile(exported.path / "model.onnx")
    assert (kept.path / "model.onnx").samefile(checkpoint.path / "model.onnx")


@pytest.mark.parametrize("name", ["model.onnx", "onnx/data.bin", "manifest.json"])
def test_a_tampered_exported_model_is_refused(registry: Registry, exported: Export, name: str) -> None:
    file = exported("w1").path / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"returns version 1: .* it is not used"):
        registry.resolve("candidate")


def test_another_exported_model_in_its_place_is_refused(registry: Registry, exported: Export, make: Make) -> None:
    version = exported("w1")
    shutil.rmtree(version.path)
    shutil.copytree(make("export", "w2").path, version.path)  # intact, but not what was registered
    with pytest.raises(UserError, match="another artifact"):
        registry.resolve("candidate")


def test_registering_again_repairs_corrupt_files(registry: Registry, make: Make, lineage: Lineage) -> None:
    version = registry.register(make().path, lineage, servable=True)
    shutil.rmtree(version.path)
    assert registry.register(make().path, lineage, servable=True) == version
    assert registry.resolve("candidate").version == version.version


def test_a_corrupt_artifact_is_not_registered(registry: Registry, make: Make, lineage: Lineage) -> None:
    artifact = make()
    (artifact.path / "model.onnx").write_text("w9")
    with pytest.raises(UserError, match="differs from what was written; run the recipe again"):
        registry.register(artifact.path, lineage, servable=True)
    assert not registry.snapshot().versions


def test_what_does_not_exist_is_said_in_one_line(registry: Registry, exported: Export) -> None:
    with pytest.raises(UserError, match=r"no best in the registry.*; name a version's number, or champion$"):
        registry.find("best")
    with pytest.raises(UserError, match="no champion in the registry"):
        registry.resolve("champion")
    with pytest.raises(UserError, match="no version 4"):
        registry.version(4)
    exported("w1")
    exported("w2")
    with pytest.raises(UserError, match=r"no version 4 in the registry \(there are: 1 to 2\)"):
        registry.version(4)


def test_reading_the_database_agrees_with_mlflows_client(
    registry: Registry, exported: Export, make: Make, monkeypatch: pytest.MonkeyPatch, lineage: Lineage
) -> None:
    exported("w1")
    registry.register(make("sft", "w2").path, lineage)
    registry.tag_model("ledger_head", "x")
    deleted = exported("w3")
    registry.mlruns.client.delete_model_version("returns", str(deleted.version))
    fast = registry.snapshot()
    monkeypatch.setattr(Mlruns, "local_database", False)
    assert registry.snapshot() == fast
    assert list(fast.versions) == [1, 2]
    assert Registry(registry.mlruns, "another").snapshot().versions == {}


def test_a_moved_project_finds_its_exported_models_and_registers_new_ones(
    registry: Registry, exported: Export, make: Make, tmp_path: Path, lineage: Lineage
) -> None:
    exported("w1")
    second = make("export", "w2").path
    new_root = tmp_path / "moved" / "mlruns"
    new_root.parent.mkdir()
    shutil.copytree(registry.mlruns.root, new_root)
    shutil.rmtree(registry.mlruns.root)
    moved = Registry(Mlruns(new_root), "returns")
    assert moved.resolve("candidate").path.is_relative_to(new_root)
    moved.register(second, lineage, servable=True)
    assert moved.resolve("candidate").version == 2
    assert not registry.mlruns.root.exists()


def test_resolving_imports_neither_mlflow_nor_torch(registry: Registry, exported: Export) -> None:
    exported("w1")
    code = (
        "import sys; from pathlib import Path; "
        "from twinloop.registry.tracking import Mlruns; from twinloop.registry.versions import Registry; "
        "from twinloop.registry.status import status; "
        f"r = Registry(Mlruns(Path({str(registry.mlruns.root)!r})), 'returns'); r.resolve('candidate'); status(r); "
        "assert not {'mlflow', 'torch', 'pandas', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
