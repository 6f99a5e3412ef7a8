"""What gives rewards besides the verifier: reward models that earlier stages made, or that lie in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Artifact
from twinloop.tasks.recipe import Recipe, is_folder


@dataclass(frozen=True)
class RewardModels:
    """Those of one stage, by the names that it gives them. inputs: what its key takes of them."""

    places: Mapping[str, Path]
    inputs: Mapping[str, Artifact | str]

    @classmethod
    def of(cls, names: list[str], project: Path, made: Mapping[str, Artifact]) -> RewardModels:
        """made: by the stages before, by their names."""
        from twinloop.models.source import open_source

        places = {name: project / name if is_folder(name) else made[name].path for name in names}
        inputs = {
            f"reward:{name}": open_source(places[name]).digest() if is_folder(name) else made[name] for name in names
        }
        return cls(places, inputs)


def check_reward_models(recipe: Recipe, project: Path) -> None:
    """Raises UserError where a stage names a folder that holds no reward model."""
    from twinloop.models.source import open_source

    for stage in recipe.train:
        for name in filter(is_folder, stage.settings.reward_models()):
            try:
                kind = open_source(project / name).config.kind
            except UserError as error:
                raise UserError(f"{stage.place}.rewards: {error}") from None
            if kind != "reward":
                raise UserError(f"{stage.place}.rewards: {name} holds no reward model; method: reward makes one")
