"""Registered versions on the champion's base are asked by name while it serves; all others are refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from releases import SEVEN_DAYS, serving, ship, wait_for

from twinloop.models.adapter import Adapter
from twinloop.models.adapter_form import linear_layers
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_adapted, save_model
from twinloop.models.exported import export_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.shapes import weight_shapes
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry import adapters as registered
from twinloop.registry.artifact import ArtifactStore
from twinloop.registry.champion import Serving, follow_champion, open_champion
from twinloop.registry.gates import record_gate
from twinloop.registry.promotion import promote
from twinloop.registry.snapshot import Version
from twinloop.registry.tracking import Mlruns
from twinloop.registry.versions import Lineage, Registry
from twinloop.serving import named
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.errors import ApiError
from twinloop.serving.model_manager import ModelManager

Adapt = Callable[..., Version]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_tokenizer([SEVEN_DAYS, "order: A10234"] * 4, 300)


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "LOOK_EVERY_S", 0.0)


@pytest.fixture
def adapt(project: Path, registry: Registry, lineage: Lineage, tokenizer: ChatTokenizer) -> Adapt:
    """Registers an adapter of this seed and rank on a base, exported with it or merged, with its gate's decision."""
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip

    def make(
        seed: int,
        *,
        base: int = 0,
        adapters: bool = True,
        precision: str = "fp32",
        gate: str | None = "SHIP",
        into: Registry = registry,
        domain: str = "returns",
    ) -> Version:
        def write(out: Path, work: Path) -> dict[str, Any]:
            random = np.random.default_rng(base)
            tensors = {
                name: random.normal(0, 0.2, shape).astype(np.float32) + ("norm" in name)
                for name, shape in weight_shapes(config).items()
            }
            save_model(work / "base", config, tensors, tokenizer)
            random = np.random.default_rng(100 + seed)
            factors = {
                name: (
                    random.normal(0, 0.3, (seed, width)).astype(np.float32),
                    random.normal(0, 0.3, (rows, seed)).astype(np.float32),
                )
                for name, (rows, width) in linear_layers(config).items()
            }
            save_adapted(work / "model", work / "base", Adapter(factors, alpha=float(seed)), skip="")
            export_model(work / "model", out, precision=precision, max_length=512, adapters=adapters)  # type: ignore[arg-type]
            return {}

        settings = {"seed": seed, "base": base, "adapters": adapters, "precision": precision, "in": into.name}
        store = ArtifactStore(project / "artifacts")
        exported = store.run("export", settings=settings, inputs={}, code="code", build=write)
        version = into.register(exported.path, replace(lineage, domain=domain), servable=True)
        if gate:
            record_gate(into, version, ship(version, gate))  # type: ignore[arg-type]
        return version

    return make


def champion(registry: Registry, version: Version) -> None:
    promote(registry, version.version, ship(version), who="ada")


def ids(manager: ModelManager) -> list[str]:
    return [version.id for version in manager.listed()]


def digest(manager: ModelManager, name: str) -> str:
    """Of the version that answers to this name, once it is loaded and has answered."""
    params = SamplingParams(max_tokens=2)

    def work(service: Any) -> str:
        with service.reserve() as place:
            (stream,) = place.submit([1, 2, 3], params)
        assert list(stream)
        return str(service.model.digest)

    return manager.submit(work, name)


def refusal(manager: ModelManager, name: str) -> str:
    with pytest.raises(ApiError) as error:
        manager.find(name)
    assert (error.value.status_code, error.value.code) == (404, "model_not_found")
    return str(error.value.detail)


def test_versions_on_the_champions_base_are_asked_by_number_and_alias(
    project: Path, registry: Registry, adapt: Adapt
) -> None:
    first, second, third = (adapt(seed) for seed in (2, 5, 3))
    champion(registry, first)
    champion(registry, second)
    other = adapt(4, into=Registry(registry.mlruns, "others"))
    with open_champion(project, "returns", Serving(slots=2, adapters=4)) as manager:
        assert ids(manager) == ["returns:v3", "returns:v1", "others:v1"]
        for name, version in {
            "returns": second,
            "returns:v2": second,
            "returns:champion": second,
            "returns:previous": first,
            "returns:1": first,
            "returns:candidate": third,
            "others:v1": other,
        }.items():
            assert digest(manager, name) == version.digest
        assert manager.loaded == 3
        for unknown in ("9", "v" + "9" * 5000, "\N{ARABIC-INDIC DIGIT ONE}", ""):
            assert refusal(manager, f"returns:{unknown}").endswith(f"returns has no version {unknown}")
        later = adapt(6)
        assert digest(manager, "returns:v4") == later.digest
        champion(registry, third)
        follow_champion(project, registry, manager, Serving(slots=2, adapters=4))
        assert ids(manager) == ["returns:v4", "returns:v2", "returns:v1", "others:v1"]
        assert digest(manager, "returns:champion") == digest(manager, "returns") == third.digest
        assert digest(manager, "returns:v2") == second.digest


def test_what_cannot_be_served_beside_the_champion_is_refused_by_name(
    project: Path, registry: Registry, adapt: Adapt
) -> None:
    champion(registry, adapt(2))
    refused = {
        adapt(3, base=1).version: "has another base than returns version 1, or was exported in another way",
        adapt(4, precision="int8").version: "has another base than returns version 1, or was exported in another way",
        adapt(5, adapters=False).version: "was exported with its adapter merged, if it has one",
        adapt(6, gate="BLOCK").version: "was not let through by its gate",
        adapt(7, gate=None).version: "was not let through by its gate",
        adapt(8, domain="chat").version: "is for another domain",
    }
    with open_champion(project, "returns", Serving(slots=1, adapters=2)) as manager:
        assert ids(manager) == []
        for number, reason in refused.items():
            name = f"returns:v{number}"
            assert refusal(manager, name) == f"model: '{name}' is not served here; returns version {number} {reason}"
        assert "returns has no version v99" in refusal(manager, "returns:v99")
        assert "returns has no version nobody" in refusal(manager, "returns:nobody")
        assert "'returns' is, and `returns:v7` names" in refusal(manager, "gpt-4o")
        assert "'returns' is, and" in refusal(manager, "returns-checkpoints:v1")


def test_a_version_whose_bytes_changed_is_not_loaded(
    project: Path, registry: Registry, adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "AGAIN_AFTER_S", 0.0)
    champion(registry, adapt(2))
    second = adapt(3)
    path = second.path / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    with open_champion(project, "returns", Serving(slots=1, adapters=2)) as manager:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ApiError, match="returns:v2 does not load") as error:
            digest(manager, "returns:v2")
        assert error.value.status_code == 503
        path.write_bytes(whole)
        assert digest(manager, "returns:v2") == second.digest


def test_a_champion_with_a_merged_adapter_has_no_others_and_its_version_is_a_name_of_it(
    project: Path, registry: Registry, adapt: Adapt
) -> None:
    champion(registry, adapt(2, adapters=False))
    adapt(3)
    with open_champion(project, "returns", Serving(slots=1, adapters=2)) as manager:
        assert (ids(manager), manager.loaded) == ([], None)
        assert refusal(manager, "returns:v2") == "model: 'returns:v2' is not served here; 'returns' is"
        assert digest(manager, "returns:v1") == digest(manager, "returns")


CASE = {
    "order": {"order_id": "A10234", "reason": "damaged", "damage_confirmed": True, "days_since_delivery": 12},
    "message": "confirm it.",
}


def test_versions_go_on_while_the_registry_cannot_be_read(
    project: Path, registry: Registry, adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion(registry, adapt(2))
    other = adapt(3)
    with open_champion(project, "returns", Serving(slots=1, adapters=1)) as manager:
        assert digest(manager, "returns:v2") == other.digest
        read, reading, go_on = registered.registered_models, threading.Event(), threading.Event()

        def away(mlruns: Mlruns) -> list[str]:
            reading.set()
            assert go_on.wait(60)
            raise OSError("no route to host")

        monkeypatch.setattr(registered, "registered_models", away)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(ids, manager)
            assert reading.wait(60)
            assert digest(manager, "returns:v2") == other.digest  # while another request waits for the registry
            go_on.set()
            assert waits.result(60) == ["returns:v2"]
        later = adapt(4)
        assert ids(manager) == ["returns:v2"]
        monkeypatch.setattr(registered, "registered_models", read)
        assert digest(manager, "returns:v3") == later.digest


def test_every_process_answers_for_a_version_by_its_name(project: Path, registry: Registry, adapt: Adapt) -> None:
    champion(registry, adapt(2))
    adapt(3)
    asked = 0
    with serving(project, "--workers", "2", "--adapters", "1") as (client, _):

        def loaded_by_both() -> bool:
            """After another request, on a connection of its own, which either process may accept."""
            nonlocal asked
            decision = httpx.post(f"{client.base_url}/v1/decisions?model=returns:v2", json=CASE, timeout=120)
            assert (decision.status_code, decision.json()["model"]["version"]) == (200, "2")
            asked += 1
            return "twinloop_adapters_loaded 2.0" in client.get("/metrics").text.splitlines()

        wait_for(loaded_by_both)
        counts = [
            float(line.rpartition(" ")[2])
            for line in client.get("/metrics").text.splitlines()
            if line.startswith("twinloop:request_success_total") and 'model_name="returns:v2"' in line
        ]
        assert sum(counts) == asked
        refused = client.post("/v1/decisions?model=returns:v9", json=CASE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
