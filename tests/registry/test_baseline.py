"""What a candidate is compared with at the gate, and that a model of another sort is refused beforehand."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from releases import ship

from twinloop.common.errors import UserError
from twinloop.models.config import Kind
from twinloop.registry.promotion import promote
from twinloop.registry.snapshot import Version
from twinloop.registry.versions import Registry
from twinloop.tasks.baseline import check_champion_kind, version_to_beat

HEADS: dict[Kind, tuple[str, ...]] = {"text": (), "labels": ("yes", "no"), "reward": ("reward",)}


def test_a_candidate_is_compared_with_the_champion_or_the_one_before_that_can_be_loaded(
    registry: Registry, three: list[Version], caplog: pytest.LogCaptureFixture
) -> None:
    def beaten(digest: str) -> Version | None:
        return version_to_beat(registry, digest, "text", "a candidate")

    assert beaten("a candidate's") == registry.version(3)
    assert beaten(three[2].digest) == registry.version(2)
    shutil.rmtree(three[2].path)
    assert beaten("a candidate's") == registry.version(2)
    assert "returns version 3, the champion: manifest.json is missing" in caplog.text
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
        version_to_beat(registry, "a candidate's", kind, "what recipes/returns.yaml makes")
    assert str(judged.value) == line
    registry.mlruns.client.rename_registered_model("returns", "returns-of-before")
    check_champion_kind(registry, kind, "what recipes/returns.yaml makes")
    assert version_to_beat(registry, "a candidate's", kind, "what recipes/returns.yaml makes") is None


@pytest.mark.parametrize(("champion", "kind"), [("text", "labels"), ("labels", "text"), ("reward", "reward")])
def test_what_is_measured_on_the_same_is_compared(
    registry: Registry, exported: Callable[..., Version], champion: Kind, kind: Kind
) -> None:
    version = exported("w1", HEADS[champion])
    promote(registry, version.version, ship(version), who="ada")
    check_champion_kind(registry, kind, "a candidate")
    assert version_to_beat(registry, "a candidate's", kind, "a candidate") == registry.version(1)


def test_a_champion_is_not_compared_with_one_of_another_sort_before_it(
    registry: Registry, exported: Callable[..., Version]
) -> None:
    reward, text = exported("w1", HEADS["reward"]), exported("w2")
    for version in (reward, text):
        promote(registry, version.version, ship(version), who="ada")
    assert version_to_beat(registry, text.digest, "text", str(text)) is None
