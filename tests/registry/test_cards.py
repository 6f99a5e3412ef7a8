"""What MLflow's pages say of a version and of its model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from releases import Make, loads, ship

from twinloop.evaluation.gate import Check
from twinloop.registry.cards import describe
from twinloop.registry.gates import record_gate
from twinloop.registry.promotion import open_ledger, promote, rollback
from twinloop.registry.snapshot import Version, VersionName
from twinloop.registry.versions import Lineage, Registry

ABOUT = {"about": "Orders and decisions.", "base": "a new network of 1,000 parameters", "rows": "1,200 rows"}


def description(registry: Registry, number: int) -> str:
    text = registry.mlruns.client.get_model_version(registry.name, str(number)).description
    assert text
    return str(text)


def test_a_version_says_what_it_is_from_what_how_it_was_judged_and_how_to_use_it(
    registry: Registry, make: Make, lineage: Lineage
) -> None:
    tuned = registry.checkpoints.register(make("sft", "s1").path, replace(lineage, about=ABOUT))
    about = replace(lineage, about=ABOUT | {"precision": "fp32"}, parent=VersionName(tuned.name, tuned.version))
    version = registry.register(make("export", "w1").path, about, servable=True)
    check = Check(
        rule="held_out_pass_rate", outcome="pass", measured=0.9, bound="at least", limit=0.8, detail="9 of 10"
    )
    promote(registry, 1, ship(version).model_copy(update={"checks": (check,)}), who="ada")
    text = description(registry, 1)
    for part in (
        "**Exported model** in fp32, domain `returns`: Orders and decisions.",
        "| made from | `returns-checkpoints/1` (sft) ← a new network of 1,000 parameters |",
        f"| data | DVC `{lineage.dataset_digest}`, 1,200 rows |",
        "**Gate**: SHIP, 1 of 1 rules pass",
        "| held_out_pass_rate | pass | 0.9 | at least 0.8 | 9 of 10 |",
        'mlflow.pyfunc.load_model("models:/returns/1")',
        "`twinloop serve --model returns`",
        "by ada",
    ):
        assert part in text
    describe(registry.checkpoints, open_ledger(registry.mlruns).read(), 1)
    text = description(registry.checkpoints, 1)
    assert "**Checkpoint after sft**, not served" in text
    assert 'mlflow.transformers.load_model("models:/returns-checkpoints/1")' in text
    model = registry.mlruns.client.get_registered_model("returns").description
    for part in ("Exported models for the domain `returns`: Orders and decisions.", "`champion` is served"):
        assert part in model


def test_a_version_that_nothing_was_ever_promoted_before_is_described(
    registry: Registry, make: Make, lineage: Lineage
) -> None:
    registry.register(make("export", "w1").path, replace(lineage, about=ABOUT), servable=True)
    describe(registry, open_ledger(registry.mlruns).read(), 1)
    assert "**Gate**: none has judged it yet." in description(registry, 1)


def test_champions_name_the_ones_before_and_after_them(registry: Registry, three: list[Version]) -> None:
    assert "by ada, after version 1; then version 3" in description(registry, 2)
    assert "by ada, after version 2" in description(registry, 3)
    rollback(registry, "bob", loads)
    assert "by bob, after version 3" in description(registry, 2)


def test_a_description_that_cannot_be_written_stops_no_promotion(
    registry: Registry, three: list[Version], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*arguments: object) -> None:
        raise OSError("MLflow is away")

    monkeypatch.setattr(registry.mlruns.client, "update_model_version", away)
    assert rollback(registry, "bob", loads).to_version == 2
    assert "descriptions in MLflow were not written" in caplog.text


def test_tags_are_short_and_the_numbers_are_metrics_of_the_logged_model(
    registry: Registry, make: Make, lineage: Lineage
) -> None:
    client = registry.mlruns.client
    run = client.create_run(registry.mlruns.experiment_id("returns")).info.run_id
    version = registry.register(make().path, lineage, run_id=run, servable=True)
    record_gate(registry, version, ship(version))
    found = client.get_model_version("returns", "1")
    assert all(len(value) <= 120 for value in found.tags.values())
    logged = client.get_logged_model(version.path.parents[1].name)
    assert {metric.key: metric.value for metric in logged.metrics} == {"bits_per_byte": 1.5}


def test_versions_of_before_checkpoints_had_a_model_of_their_own_are_read(
    registry: Registry, make: Make, lineage: Lineage
) -> None:
    checkpoint = registry.register(make("sft", "s1").path, lineage)
    version = registry.register(make("export", "w1").path, lineage, servable=True)
    registry.tag(version, {"parent_version": "1", "parent": ""})
    assert [each.stage for each in registry.lineage(registry.version(2))] == ["export", "sft"]
    assert not checkpoint.servable
