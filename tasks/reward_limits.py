"""Whether a reward model may give rewards: what it is worth is measured before anything is trained on what it says."""

from __future__ import annotations

from collections.abc import Mapping

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context
from twinloop.tasks.measure import measure
from twinloop.tasks.recipe import Recipe, TrainStage
from twinloop.training.runtime import Runtime
from twinloop.training.settings import RewardSource


def check_imported_reward_models(
    context: Context,
    recipe: Recipe,
    runtime: Runtime,
    *,
    data: Artifact,
    imported: Mapping[str, Mapping[str, Artifact]],
) -> None:
    """Measure the reward models that no stage makes, and raise UserError as `check_reward_models`. imported: by stage
    and setting."""
    for stage in recipe.train:
        measured = {
            setting: measure(context, _name(stage, setting), recipe.evaluate, runtime, data=data, model=model)
            for setting, model in imported.get(stage.name, {}).items()
            if setting in stage.settings.reward_models()
        }
        _check(stage, measured)


def check_reward_models(stage: TrainStage, measured: Mapping[str, Artifact]) -> None:
    """Raises UserError for a reward model that does not keep to the limits beside its name in the recipe. measured:
    what stages before this one came to, by their names."""
    _check(stage, {setting: measured[maker] for setting, maker in stage.earlier.items() if maker in measured})


def unfit(source: RewardSource, measured: Mapping[str, object]) -> str | None:
    """Which of its limits a reward model does not keep to, in words. measured: as `measure` gives it."""
    interval, hacked = measured["pass_rate_interval"], measured.get("reward_hacking_share")
    assert isinstance(interval, list)
    wrong = []
    if interval[0] < source.min_accuracy:
        wrong.append(
            f"it may be right in only {interval[0]:.1%} of pairs that it has not seen, by the lower end of the "
            f"interval (min_accuracy: {source.min_accuracy:g})"
        )
    if isinstance(hacked, float) and hacked > source.max_hacking:
        wrong.append(
            f"{hacked:.1%} of the audit's wrong answers score as high as the right one (max_hacking: "
            f"{source.max_hacking:g})"
        )
    return ", and ".join(wrong) or None


def _check(stage: TrainStage, measured: Mapping[str, Artifact]) -> None:
    for setting, source in stage.settings.reward_models().items():
        if setting in measured and (wrong := unfit(source, measured[setting].metrics)):
            raise UserError(
                f"{stage.place}.{setting}: this reward model is not good enough to learn from: {wrong}; train it on "
                "more pairs, or on some with such answers, or change the limit beside its name"
            )


def _name(stage: TrainStage, setting: str) -> str:
    """Of an artifact: `ppo-rewards-1`."""
    return f"{stage.name}-{setting.removesuffix('.model').replace('[', '-').rstrip(']')}"
