"""After any sequence of changes made in MLflow, commands and kills: claims are true, and a run makes a champion."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from releases import Make, agrees, consistent, loads, ship

from twinloop.common.errors import UserError
from twinloop.registry import ledger as ledger_module
from twinloop.registry.promotion import finish_interrupted, promote, rollback
from twinloop.registry.status import status
from twinloop.registry.versions import Lineage, Registry

NAME = "returns"


class Death(BaseException):
    """The process is killed here."""


class World:
    """A registry, what people do to it in MLflow, and the commands."""

    def __init__(
        self, registry: Registry, make: Make, lineage: Lineage, dice: random.Random, patch: pytest.MonkeyPatch
    ):
        self.registry, self.make, self.lineage, self.dice, self.patch = registry, make, lineage, dice, patch
        self.client = registry.mlruns.client
        self.renamed = 0

    # what people do

    def delete_version(self) -> None:
        if number := self._some_version():
            self.client.delete_model_version(NAME, str(number))

    def delete_alias(self) -> None:
        self.client.delete_registered_model_alias(NAME, self.dice.choice(["champion", "previous", "candidate"]))

    def move_alias(self) -> None:
        if number := self._some_version():
            self.client.set_registered_model_alias(NAME, self.dice.choice(["champion", "previous"]), str(number))

    def delete_model(self) -> None:
        self.client.delete_registered_model(NAME)

    def rename_model(self) -> None:
        self.renamed += 1
        self.client.rename_registered_model(NAME, f"kept {self.renamed}")

    def add_checkpoint(self) -> None:
        self.registry.register(self.make("sft", "s1").path, self.lineage)

    def add_foreign_version(self) -> None:
        self.client.create_model_version(NAME, source=self.registry.mlruns.root.as_uri(), await_creation_for=0)

    def delete_files(self) -> None:
        versions = list(self.registry.snapshot().versions.values())
        if versions:
            shutil.rmtree(self.dice.choice(versions).path, ignore_errors=True)

    def delete_experiment(self) -> None:
        self.client.delete_experiment(self.registry.mlruns.experiment_id(NAME))

    # commands

    def run(self) -> None:
        finish_interrupted(self.registry, "the schedule")
        artifact = self.make("export", self.dice.choice(["w1", "w2", "w3"]))
        version = self.registry.register(artifact.path, self.lineage, servable=True)
        self._moved(promote(self.registry, version.version, ship(version), who="the schedule").to_version)

    def promote(self) -> None:
        number = self._some_version() or 1
        report = ship(self.registry.version(number), rules=f"r{self.dice.randrange(99)}")
        self._moved(promote(self.registry, number, report, who="ada", manual=True).to_version)

    def rollback(self) -> None:
        self._moved(rollback(self.registry, "ada", loads).to_version)

    def die(self) -> None:
        """A command that is killed somewhere in its writing."""
        left = self.dice.randrange(5)

        def dying(write: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Death
                left -= 1
                return write(*arguments, **options)

            return wrapped

        with self.patch.context() as patch:
            for name in ("set_registered_model_alias", "delete_registered_model_alias", "set_registered_model_tag"):
                patch.setattr(self.client, name, dying(getattr(self.client, name)))
            patch.setattr(ledger_module, "_append", dying(ledger_module._append))
            with suppress(Death):
                self.dice.choice([self.run, self.promote, self.rollback])()

    # what must hold

    def check(self) -> None:
        seen, named = status(self.registry), self._champion()
        assert (seen.champion.version if seen.champion else None) in (named, None)
        if seen.champion is None and named is not None:
            assert f"version {named}, was not registered by Twinloop" in "\n".join(seen.warnings)
        assert seen.to_text()
        assert seen.to_json()
        with suppress(UserError):
            assert self.registry.resolve("champion").version == named

    def _moved(self, to_version: int | None) -> None:
        assert self._champion() == to_version
        assert self.registry.resolve("champion").version == to_version
        agrees(self.registry)

    def _champion(self) -> int | None:
        try:
            return int(self.client.get_model_version_by_alias(NAME, "champion").version)
        except MlflowException:
            return None

    def _some_version(self) -> int | None:
        found = [int(each.version) for each in self.client.search_model_versions(f"name = '{NAME}'")]
        return self.dice.choice(found) if found else None


PEOPLE = (
    "delete_version", "delete_version", "delete_alias", "move_alias", "move_alias", "delete_model", "rename_model",
    "add_checkpoint", "add_foreign_version", "delete_files", "delete_experiment",
)  # fmt: skip
COMMANDS = ("run", "run", "promote", "rollback", "die")


@pytest.mark.parametrize("seed", range(6))
def test_after_any_sequence_of_changes_and_commands_claims_are_true_and_a_run_makes_a_champion(
    registry: Registry, make: Make, lineage: Lineage, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    dice = random.Random(seed)
    world = World(registry, make, lineage, dice, monkeypatch)
    done = []
    for _ in range(20):
        name = dice.choice(dice.choice([PEOPLE, COMMANDS]))
        done.append(name)
        try:
            getattr(world, name)()
        except UserError:  # a command that says why not
            assert name in COMMANDS, done
        except MlflowException:  # there was nothing to delete
            assert name in PEOPLE, done
        world.check()
    finish_interrupted(registry, "the schedule")
    version = registry.register(make("export", f"fresh {seed}").path, lineage, servable=True)
    promote(registry, version.version, ship(version), who="the schedule")
    assert registry.resolve("champion").version == version.version, done
    consistent(registry)
