"""Whether a reward model may give rewards: what it is worth is measured before anything is trained on what it says."""

from __future__ import annotations

from collections.abc import Mapping

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context
from twinloop.tasks.measure import measure
from twinloop.tasks.recipe import EvaluateSettings, TrainStage
from twinloop.training.runtime import Runtime
from twinloop.training.settings import RewardSource, RolloutSettings


def check_payers(
    context: Context,
    stage: TrainStage,
    settings: EvaluateSettings,
    runtime: Runtime,
    *,
    data: Artifact,
    models: Mapping[str, Artifact],
    measured: Mapping[str, Artifact],
) -> None:
    """Raises UserError for a reward model of the stage that its limits, beside its name in the recipe, do not let pay.

    models: those that the stage reads, by setting. measured: what stages before it came to, by their names; a reward
    model that none of them made is measured here.
    """
    if not isinstance(stage.settings, RolloutSettings):
        return
    for setting, source in stage.settings.paying_models().items():
        maker = stage.earlier.get(setting)
        name = f"{stage.name}-{setting.removesuffix('.model').replace('[', '-').rstrip(']')}"
        judged = (
            measured[maker]
            if maker is not None
            else measure(context, name, settings, runtime, data=data, model=models[setting])
        )
        if wrong := unfit(source, judged.metrics):
            raise UserError(
                f"{stage.place}.{setting}: this reward model is not good enough to pay by: {wrong}; train it on more "
                "pairs, or on some with such answers, or change the limit beside its name"
            )


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
