"""A real MLflow store for each test, and real artifacts to register in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from releases import ship

from twinloop.registry.artifact import Artifact, ArtifactStore
from twinloop.registry.promotion import promote
from twinloop.registry.snapshot import Version
from twinloop.registry.tracking import CodeVersion, Mlruns
from twinloop.registry.versions import Lineage, Registry


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: that takes a second."""
    mlruns = Mlruns(tmp_path_factory.mktemp("mlflow"))
    assert mlruns.client
    return mlruns.database


@pytest.fixture
def mlruns(tmp_path: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Mlruns:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(migrated_database, tmp_path / "mlruns" / "mlflow.db")
    return Mlruns(tmp_path / "mlruns")


@pytest.fixture
def registry(mlruns: Mlruns) -> Registry:
    return Registry(mlruns, "returns")


@pytest.fixture
def lineage() -> Lineage:
    code = CodeVersion("c0ffee" * 6 + "c0ff")
    return Lineage(recipe="recipes/returns.yaml", domain="returns", dataset_digest="d41d8.dir", code=code)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Artifact]:
    """Makes a real artifact of a stage, with these weights."""

    def build(stage: str = "export", weights: str = "w1") -> Artifact:
        def write(out: Path, work: Path) -> dict[str, float]:
            (out / "model.onnx").write_text(weights)
            (out / "onnx").mkdir()
            (out / "onnx" / "data.bin").write_bytes(weights.encode() * 100)
            return {"bits_per_byte": 1.5}

        store = ArtifactStore(tmp_path / "artifacts")
        return store.run(stage, settings={"weights": weights}, inputs={}, code="code", build=write)

    return build


@pytest.fixture
def exported(registry: Registry, make: Callable[..., Artifact], lineage: Lineage) -> Callable[[str], Version]:
    """Registers an exported model with these weights."""

    def register(weights: str) -> Version:
        return registry.register(make("export", weights).path, lineage, servable=True)

    return register


@pytest.fixture
def three(registry: Registry, exported: Callable[[str], Version]) -> list[Version]:
    """Three champions, one after the other."""
    versions = [exported(weights) for weights in ("w1", "w2", "w3")]
    for version in versions:
        promote(registry, version.version, ship(version), who="ada")
    return versions
