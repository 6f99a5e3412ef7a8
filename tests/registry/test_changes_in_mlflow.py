"""People delete, rename and move in MLflow itself: every command says what is gone and goes on with what exists."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from releases import Export, Make, champions, consistent, history, loads, ship

from twinloop.common.errors import UserError
from twinloop.registry.gates import record_gate
from twinloop.registry.promotion import finish_interrupted, open_ledger, promote, rollback
from twinloop.registry.snapshot import Version, VersionName
from twinloop.registry.status import status
from twinloop.registry.versions import Lineage, Registry

NAME = "returns"


def warnings(registry: Registry) -> str:
    return "\n".join(status(registry).warnings)


def begin(registry: Registry, version: Version, *, champion: int | None, aliases: dict[str, int] | None = None) -> None:
    """A promotion whose process died after it had moved these aliases."""
    report = ship(version)
    record_gate(registry, version, report)
    open_ledger(registry.mlruns).append(
        "intent", action="promote", model=NAME, from_version=champion, to_version=version.version, who="the dead",
        manifest_digest=version.digest, gate_digest=report.digest(),
    )  # fmt: skip
    registry.move(aliases or {})


# --- versions and aliases ---------------------------------------------------------------------------------------------


def test_a_champion_that_was_deleted_is_no_champion_and_a_rollback_goes_to_the_one_before(
    registry: Registry, three: list[Version]
) -> None:
    registry.mlruns.client.delete_model_version(NAME, "3")
    seen = status(registry)
    assert seen.champion is None
    assert "there is no champion: version 3 was deleted in MLflow; `twinloop rollback` goes back to version 2" in (
        warnings(registry)
    )
    assert "promote to version 3 (gone from MLflow)" in seen.to_text()
    with pytest.raises(UserError, match=r"no champion in the registry \(its versions are 1 to 2"):
        registry.resolve("champion")
    with pytest.raises(UserError, match=r"no version 3 in the registry"):
        promote(registry, 3, who="ada", manual=True)
    assert rollback(registry, "ada", loads).to_version == 2
    assert champions(registry) == {"champion": 2, "previous": 1}
    consistent(registry)
    assert status(registry).warnings == []


def test_a_deleted_version_in_between_is_named(registry: Registry, three: list[Version]) -> None:
    registry.mlruns.client.delete_model_version(NAME, "2")
    assert "of the champions before this one version 2 was deleted in MLflow; a rollback goes to version 1" in (
        warnings(registry)
    )
    with pytest.raises(UserError, match=r"no version 2 in the registry \(it was deleted in MLflow; there are: 1, 3\)"):
        promote(registry, 2, who="ada", manual=True)
    assert rollback(registry, "ada", loads).to_version == 1


def test_a_champion_whose_alias_was_removed_is_made_champion_again_and_not_only_called_so(
    registry: Registry, three: list[Version]
) -> None:
    registry.mlruns.client.delete_registered_model_alias(NAME, "champion")
    assert "the alias of version 3 was removed in MLflow; `twinloop promote 3`" in warnings(registry)
    assert promote(registry, 3, who="ada", manual=True).action == "promote"
    assert champions(registry) == {"champion": 3, "previous": 2}
    consistent(registry)


def test_a_run_makes_the_champion_again_after_its_alias_was_removed(registry: Registry, three: list[Version]) -> None:
    registry.mlruns.client.delete_registered_model_alias(NAME, "champion")
    promote(registry, 3, ship(three[2]), who="the schedule")
    assert champions(registry)["champion"] == 3


def test_where_every_version_before_was_deleted_there_is_nothing_to_roll_back_to(
    registry: Registry, three: list[Version]
) -> None:
    for number in ("1", "2"):
        registry.mlruns.client.delete_model_version(NAME, number)
    with pytest.raises(UserError, match="before this one version 1 was deleted in MLflow, version 2 was deleted"):
        rollback(registry, "ada", loads)
    assert champions(registry) == {"champion": 3}


def test_a_champion_that_twinloop_did_not_register_is_not_said_to_be_gone(registry: Registry, exported: Export) -> None:
    first = exported("w1")
    client = registry.mlruns.client
    client.create_model_version(NAME, client.get_model_version(NAME, "1").source)
    client.set_registered_model_alias(NAME, "champion", "2")
    promote(registry, 1, ship(first), who="ada")
    assert "version 2 was not registered by Twinloop; there is nothing to roll back to" in warnings(registry)
    with pytest.raises(UserError, match="version 2 was not registered by Twinloop"):
        rollback(registry, "ada", loads)


def test_an_alias_previous_that_was_moved_is_where_a_rollback_goes(registry: Registry, three: list[Version]) -> None:
    registry.mlruns.client.set_registered_model_alias(NAME, "previous", "1")
    assert rollback(registry, "ada", loads).to_version == 1
    consistent(registry)


def test_an_alias_previous_of_what_was_never_a_champion_is_no_way_past_the_gate(
    registry: Registry, three: list[Version], exported: Export
) -> None:
    exported("w4")
    registry.mlruns.client.set_registered_model_alias(NAME, "previous", "4")
    assert rollback(registry, "ada", loads).to_version == 2


@pytest.mark.parametrize("kind", ["checkpoint", "foreign"])
def test_a_champion_that_cannot_be_served_is_named_and_left_by_a_rollback(
    registry: Registry, three: list[Version], make: Make, lineage: Lineage, kind: str
) -> None:
    client = registry.mlruns.client
    if kind == "checkpoint":  # as registries of before have them
        registry.register(make("sft", "s1").path, lineage)
    else:
        client.create_model_version(NAME, source=registry.mlruns.root.as_uri(), await_creation_for=0)
    client.set_registered_model_alias(NAME, "champion", "4")
    expected = {"checkpoint": "is a sft checkpoint and cannot be served", "foreign": "was not registered by Twinloop"}
    assert expected[kind] in warnings(registry)
    assert rollback(registry, "ada", loads).to_version == 3
    assert champions(registry) == {"champion": 3, "previous": 2}
    consistent(registry)


# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_model_that_is_gone_is_made_anew_and_no_old_champion_is_claimed(
    registry: Registry, three: list[Version], exported: Export, how: str
) -> None:
    client = registry.mlruns.client
    if how == "deleted":
        client.delete_registered_model(NAME)
    else:
        client.rename_registered_model(NAME, "kept")
    assert "MLflow has no registered model returns any more, it was deleted or renamed there" in warnings(registry)
    assert status(registry).champion is None
    for command in (
        lambda: promote(registry, 3, who="ada", manual=True),
        lambda: rollback(registry, "ada", loads),
        lambda: registry.resolve("champion"),
    ):
        with pytest.raises(UserError, match="MLflow has no registered model returns"):
            command()
    assert finish_interrupted(registry, "the schedule") is None
    again = exported("w1")  # the same bytes as the first champion: version 1 again
    assert again.version == 1
    assert status(registry).champion is None
    assert promote(registry, 1, ship(again), who="the schedule").action == "promote"
    assert champions(registry)["champion"] == 1
    with pytest.raises(UserError, match="nothing to roll back to"):
        rollback(registry, "ada", loads)
    consistent(registry)


def test_a_version_of_the_same_number_and_other_bytes_is_not_taken_for_the_old_one(
    registry: Registry, three: list[Version], exported: Export
) -> None:
    registry.mlruns.client.delete_registered_model(NAME)
    new = exported("other")
    registry.mlruns.client.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(UserError, match="nothing to roll back to"):
        rollback(registry, "ada", loads)
    assert new.version == 1
    assert history(registry)[-1].action == "adopt"
    assert history(registry)[-1].manifest_digest == new.digest


def test_what_was_rolled_back_does_not_return_under_a_new_number(
    registry: Registry, three: list[Version], exported: Export
) -> None:
    rollback(registry, "bob", loads)
    registry.mlruns.client.delete_model_version(NAME, "3")
    again = exported("w3")
    assert again.version == 4
    with pytest.raises(UserError, match="version 4: not promoted, bob took it back on"):
        promote(registry, 4, ship(again), who="the schedule")


def test_checkpoints_that_were_deleted_are_named_and_registered_again(
    registry: Registry, make: Make, lineage: Lineage
) -> None:
    def register() -> Version:
        tuned = registry.checkpoints.register(make("sft", "s1").path, lineage)
        about = replace(lineage, parent=VersionName(tuned.name, tuned.version))
        return registry.register(make("export", "w1").path, about, servable=True)

    register()
    registry.mlruns.client.delete_model_version("returns-checkpoints", "1")
    assert "returns-checkpoints/1 (not in MLflow any more)" in status(registry).to_text()
    version = register()
    assert (version.version, str(version.parent)) == (1, "returns-checkpoints/2")
    assert [origin.kind for origin in status(registry).origins][:2] == ["export", "sft"]


# --- in the middle of a move ------------------------------------------------------------------------------------------


def test_an_interrupted_move_whose_target_was_deleted_is_given_up(
    registry: Registry, three: list[Version], exported: Export
) -> None:
    begin(registry, exported("w4"), champion=3, aliases={"previous": 3, "champion": 4})
    registry.mlruns.client.delete_model_version(NAME, "4")
    assert rollback(registry, "ada", loads).to_version == 2
    consistent(registry)


def test_an_interrupted_move_whose_model_was_deleted_is_given_up(
    registry: Registry, three: list[Version], exported: Export
) -> None:
    begin(registry, exported("w4"), champion=3, aliases={"previous": 3})
    registry.mlruns.client.delete_registered_model(NAME)
    finish_interrupted(registry, "the schedule")
    assert open_ledger(registry.mlruns).read().pending() is None
    again = exported("w4")
    promote(registry, again.version, ship(again), who="the schedule")
    consistent(registry)


def test_an_interrupted_move_does_not_undo_what_somebody_set_in_mlflow_since(
    registry: Registry, three: list[Version], exported: Export
) -> None:
    begin(registry, exported("w4"), champion=3)
    registry.mlruns.client.set_registered_model_alias(NAME, "champion", "1")
    finish_interrupted(registry, "the schedule")
    assert champions(registry)["champion"] == 1
    consistent(registry)


# --- what lies behind a version ---------------------------------------------------------------------------------------


def test_files_that_were_deleted_are_named_and_put_back_by_a_run(
    registry: Registry, three: list[Version], exported: Export
) -> None:
    shutil.rmtree(three[2].path.parent)
    assert "the files of champion (returns version 3) are gone" in warnings(registry)
    with pytest.raises(UserError, match=r"version 3: .* it is not used"):
        promote(registry, 3, who="ada", manual=True)
    assert rollback(registry, "ada", loads).to_version == 2
    exported("w3")
    assert registry.verify(registry.version(3)).version == 3


def test_a_run_an_experiment_and_a_logged_model_that_were_deleted_stop_nothing(
    registry: Registry, make: Make, lineage: Lineage
) -> None:
    client = registry.mlruns.client
    experiment = registry.mlruns.experiment_id(NAME)
    run = client.create_run(experiment).info.run_id
    first = registry.register(make("export", "w1").path, lineage, run_id=run, servable=True)
    (logged,) = client.search_logged_models([experiment])
    client.delete_logged_model(logged.model_id)
    client.delete_run(run)
    client.delete_experiment(experiment)
    promote(registry, first.version, ship(first), who="ada")
    second = registry.register(make("export", "w2").path, lineage, run_id=run, servable=True)
    promote(registry, second.version, ship(second), who="ada")
    assert registry.register(make("export", "w1").path, lineage, run_id=run, servable=True) == registry.version(1)
    assert rollback(registry, "ada", loads).to_version == 1
    consistent(registry)
