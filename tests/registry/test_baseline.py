"""What a candidate is compared with at the gate, and that a model of another sort is refused beforehand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Literal

import pytest
from releases import ship

from twinloop.common.errors import UserError
from twinloop.domains.returns import domain
from twinloop.evaluation.case_report import Comparison
from twinloop.evaluation.gate import Check, GateRules, judge
from twinloop.evaluation.rules import Measurements
from twinloop.models.config import Kind
from twinloop.registry.artifact import Artifact
from twinloop.registry.promotion import promote
from twinloop.registry.snapshot import Version
from twinloop.registry.versions import Lineage, Registry
from twinloop.tasks.baseline import Baseline, check_champion_kind, find_baseline

HEADS: dict[Kind, tuple[str, ...]] = {"text": (), "labels": ("yes", "no"), "reward": ("reward",)}


def test_a_candidate_is_compared_with_the_champion_or_the_one_before_that_can_be_loaded(
    registry: Registry, three: list[Version], caplog: pytest.LogCaptureFixture
) -> None:
    def beaten(digest: str) -> Version | None:
        return find_baseline(registry, digest, "text", "a candidate").version

    assert beaten("a candidate's") == registry.version(3)
    assert beaten(three[2].digest) == registry.version(2)
    shutil.rmtree(three[2].path)
    assert beaten("a candidate's") == registry.version(2)
    assert "returns version 3, the champion, is damaged (manifest.json is missing or changed)" in caplog.text
    registry.mlruns.client.delete_registered_model("returns")
    assert beaten("a candidate's") is None


@pytest.mark.parametrize(
    ("champion", "kind", "said"),
    [
        ("reward", "text", "is a reward model and what recipes/returns.yaml makes is a model that writes text"),
        ("reward", "labels", "is a reward model and what recipes/returns.yaml makes is a classifier"),
        ("text", "reward", "is a model that writes text and what recipes/returns.yaml makes is a reward model"),
        ("labels", "reward", "is a classifier and what recipes/returns.yaml makes is a reward model"),
    ],
)
def test_what_is_measured_on_other_things_than_the_champion_is_refused_in_one_line(
    registry: Registry, exported: Callable[..., Version], champion: Kind, kind: Kind, said: str
) -> None:
    version = exported("w1", HEADS[champion])
    promote(registry, version.version, ship(version), who="ada")
    line = (
        f"returns version 1, the champion, {said}: they are measured on different things, so no gate can compare them; "
        "give the recipe another `name`, or rename the registered model returns in MLflow"
    )
    with pytest.raises(UserError) as before:
        check_champion_kind(registry, kind, "what recipes/returns.yaml makes")
    assert str(before.value) == line
    with pytest.raises(UserError) as judged:
        find_baseline(registry, "a candidate's", kind, "what recipes/returns.yaml makes")
    assert str(judged.value) == line
    registry.mlruns.client.rename_registered_model("returns", "returns-of-before")
    check_champion_kind(registry, kind, "what recipes/returns.yaml makes")
    assert find_baseline(registry, "a candidate's", kind, "what recipes/returns.yaml makes") == Baseline()


@pytest.mark.parametrize(("champion", "kind"), [("text", "labels"), ("labels", "text"), ("reward", "reward")])
def test_what_is_measured_on_the_same_is_compared(
    registry: Registry, exported: Callable[..., Version], champion: Kind, kind: Kind
) -> None:
    version = exported("w1", HEADS[champion])
    promote(registry, version.version, ship(version), who="ada")
    check_champion_kind(registry, kind, "a candidate")
    assert find_baseline(registry, "a candidate's", kind, "a candidate") == Baseline(registry.version(1))


def test_a_champion_is_not_compared_with_one_of_another_sort_before_it(
    registry: Registry, exported: Callable[..., Version]
) -> None:
    reward, text = exported("w1", HEADS["reward"]), exported("w2")
    for version in (reward, text):
        promote(registry, version.version, ship(version), who="ada")
    note = "returns version 1, the champion before, is a reward model"
    assert find_baseline(registry, text.digest, "text", str(text)) == Baseline(None, note)


def test_a_damaged_champion_blocks_unless_the_one_before_can_stand_in_for_it(
    registry: Registry, three: list[Version]
) -> None:
    def check(digest: str) -> Check:
        """Of the rule, where the candidate lost and won nothing."""
        baseline = find_baseline(registry, digest, "text", "a candidate")
        compared: Comparison | Literal["none"] | None = None if baseline.damaged else "none"
        if baseline.version:
            compared = Comparison(champion=str(baseline.version.version), lost=0, won=0, total=9)
        found = Measurements(champion=compared, champion_note=baseline.note)
        (only,) = judge(GateRules({"champion_net_loss": 0.02}, domain), found).checks
        return only

    (three[2].path / "model.onnx").unlink()
    damaged = "returns version 3, the champion, is damaged (model.onnx is missing); "
    repair = "its recipe, run again, repairs it"
    stands_in = check("a candidate's")
    assert stands_in.outcome == "pass"
    assert stands_in.detail == f"lost 0, won 0 of 9 against version 2 (p = 1.000); {damaged}{repair}"
    (three[1].path / "model.onnx").write_text("other weights")
    before = "returns version 2, the champion before, is damaged (model.onnx differs from what was written); "
    blocked = check("a candidate's")
    assert blocked.outcome == "block"
    assert blocked.detail == f"not measured: {damaged}{repair}; {before}{repair}"
    repairing = check(three[2].digest)
    assert (repairing.outcome, repairing.detail) == ("skipped", f"{before}{repair}")


def test_a_checkpoint_that_was_made_the_champion_in_mlflow_is_named_and_blocks_nothing(
    registry: Registry, make: Callable[..., Artifact], lineage: Lineage
) -> None:
    checkpoint = registry.register(make("sft").path, lineage)
    registry.move({"champion": checkpoint.version})
    note = "returns version 1, the champion in MLflow, is a sft checkpoint"
    assert find_baseline(registry, "a candidate's", "text", "a candidate") == Baseline(None, note)
