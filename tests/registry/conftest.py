"""A real MLflow store for each test, and real artifacts to register in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from releases import SEVEN_DAYS, ship

from twinloop.evaluation.gate import GateReport
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.models.family import write_config
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.registry.artifact import Artifact, ArtifactStore
from twinloop.registry.promotion import promote
from twinloop.registry.snapshot import Version
from twinloop.registry.tracking import CodeVersion, Mlruns
from twinloop.registry.versions import Lineage, Registry
from twinloop.serving.knowledge.documents import DocumentStore

PROJECT = Path(__file__).parents[2]


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
    """Makes a real artifact of a stage, with these weights. labels: of the network's head."""

    def build(stage: str = "export", weights: str = "w1", labels: tuple[str, ...] = ()) -> Artifact:
        def write(out: Path, work: Path) -> dict[str, float]:
            config = DecoderConfig(
                vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=32, labels=labels,
            )  # fmt: skip
            (out / "config.json").write_text(json.dumps(write_config(config)))
            (out / "model.onnx").write_text(weights)
            (out / "onnx").mkdir()
            (out / "onnx" / "data.bin").write_bytes(weights.encode() * 100)
            return {"bits_per_byte": 1.5}

        store = ArtifactStore(tmp_path / "artifacts")
        return store.run(stage, settings={"weights": weights, "labels": labels}, inputs={}, code="code", build=write)

    return build


@pytest.fixture
def exported(registry: Registry, make: Callable[..., Artifact], lineage: Lineage) -> Callable[..., Version]:
    """Registers an exported model with these weights, and a head of these labels."""

    def register(weights: str, labels: tuple[str, ...] = ()) -> Version:
        return registry.register(make("export", weights, labels).path, lineage, servable=True)

    return register


@pytest.fixture
def three(registry: Registry, exported: Callable[[str], Version]) -> list[Version]:
    """Three champions, one after the other."""
    versions = [exported(weights) for weights in ("w1", "w2", "w3")]
    for version in versions:
        promote(registry, version.version, ship(version), who="ada")
    return versions


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("{}")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "returns.yaml").write_text((PROJECT / "recipes" / "returns.yaml").read_text())
    documents = DocumentStore(tmp_path / "state" / "documents" / "returns.db")
    documents.put("P-7", "damaged items reported within 30 days are eligible.")
    return tmp_path


@pytest.fixture
def release(project: Path, registry: Registry, lineage: Lineage) -> Callable[..., Version]:
    """Makes a real exported model with random weights, registers it, and promotes it."""
    import torch

    from twinloop.models.decoder import Decoder

    tokenizer = train_tokenizer([SEVEN_DAYS, "order: A10234"] * 4, 300)

    def make(seed: int, domain: str = "returns", fingerprint: str | None = None) -> Version:
        def write(out: Path, work: Path) -> dict[str, Any]:
            torch.manual_seed(seed)
            config = DecoderConfig(
                vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
            )  # fmt: skip
            tensors = {name: tensor.detach().numpy() for name, tensor in Decoder(config).state_dict().items()}
            save_model(work / "model", config, tensors, tokenizer)
            export_model(work / "model", out, precision="fp32", max_length=512)
            return {}

        store = ArtifactStore(project / "artifacts")
        exported = store.run("export", settings={"seed": seed}, inputs={}, code="code", build=write)
        about = replace(lineage, domain=domain, domain_fingerprint=fingerprint)
        version = registry.register(exported.path, about, servable=True)
        report = GateReport(decision="SHIP", reasons=(), checks=(), candidate=version.digest, rules_digest="r1")
        promote(registry, version.version, report, who="ada")
        return version

    return make
