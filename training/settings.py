"""Settings of training. A method's `Settings` derive from one of these; the recipe's stage holds their values.

Imports no torch: recipes are checked in 0.1 s. What `twinloop plan` and the checks before a run ask of a stage are
methods here, with answers that fit most methods; a method's own Settings may answer differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, computed_field, field_validator, model_validator

from twinloop.models.adapter_form import TARGETS, AdapterForm, Target

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


def _model_name(value: Any) -> Any:
    if isinstance(value, str) and value:
        return {"path": value} if "/" in value else {"stage": value}
    if isinstance(value, dict):
        return value
    raise ValueError(f"{value!r} names no model; take an earlier stage, a folder such as ./models/a, or {{version: 1}}")


ModelName: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_model_name)]
"""Another model in a setting: `{stage: reward}`, what an earlier stage makes, or a trained one as `base` names it, such
as `{version: champion}` or `{path: DIR}`. In short a stage's name, or a folder: it has a `/`. Recipes check it."""


@dataclass(frozen=True)
class NamedModel:
    """kind: what it has to be. One that writes text reads the stage's tokens: it has the same tokenizer."""

    name: ModelName
    kind: Literal["text", "reward"] = "text"


class StrictModel(BaseModel):
    """ "8" is not 8, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class LoRASettings(StrictModel):
    """A low-rank adapter that is trained in place of the network's weights (Hu et al., 2021)."""

    rank: Count
    alpha: Positive = 16.0
    """What it adds is scaled by alpha / rank."""
    targets: Annotated[list[Target], Field(min_length=1)] = list(TARGETS)
    """The linear layers that it adapts; `all-linear` for all of them."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank), so that a higher rank does not learn more slowly (Kalajdzievski, 2023)."""
    merge: bool = False
    """Make a whole model of what was trained, and forget the adapter. Else it is kept beside the base that it is of;
    adapters of stages after each other become one."""

    @field_validator("targets", mode="before")
    @classmethod
    def _all_linear(cls, targets: Any) -> Any:
        return list(TARGETS) if targets == "all-linear" else targets

    @property
    def form(self) -> AdapterForm:
        chosen = tuple(target for target in TARGETS if target in self.targets)
        return AdapterForm(self.rank, self.alpha, self.rank_stabilised, chosen)


class TrainSettings(StrictModel):
    """What every stage of training has. warmup_ratio, decay_ratio: shares of all steps, at the start and at the end."""

    learning_rate: Positive
    """The peak. Muon's updates are scaled to half the size of AdamW's, so one rate serves both."""
    micro_batch_size: Count | None = None
    """Rows that go through the network at once, where memory is short; the result is the same within rounding."""
    warmup_ratio: Share = 0.02
    decay_ratio: Share = 0.5
    weight_decay: NotNegative = 0.0
    optimizer: Literal["muon", "adamw"] = "muon"
    """Of the hidden matrices; everything else, adapters included, is AdamW's."""
    lora: LoRASettings | None = None
    """Train an adapter, not the network. The reference of DPO, GRPO and PPO is then the network without it."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"warmup_ratio ({self.warmup_ratio}) and decay_ratio ({self.decay_ratio}) are shares of one run: "
                "together at most 1"
            )
        return self

    # --- asked by `twinloop plan` and by the checks before a run

    def check_context(self, max_length: int) -> None:
        """Raises ValueError where the settings do not fit a network of this context length."""

    def shape(self, max_length: int) -> tuple[int, int]:
        """(rows, tokens a row) that go through the network at once."""
        return self.micro_batch_size or 1, max_length

    def answer_tokens(self) -> int:
        """The most tokens that are sampled after a prompt."""
        return 0

    def has_reference(self) -> bool:
        """Whether it is compared with a frozen network while it trains: a copy in memory, unless it has an adapter."""
        return False

    def needs_verifier(self) -> bool:
        """Whether the verifier gives rewards, in a method that can take them from it."""
        return True

    def keyed(self) -> dict[str, Any]:
        """Those on which it depends what is trained."""
        return self.model_dump()

    def reward_models(self) -> Mapping[str, RewardSource]:
        """The reward models that give rewards, by the setting that names each."""
        return {}

    def named_models(self) -> Mapping[str, NamedModel]:
        """Other models that the method reads, by the setting that names each, such as `teacher`."""
        return {}

    def with_models(self, places: Mapping[str, Path]) -> Self:
        """The same, each of these models named by its directory, {path: DIR}: what `build` gets."""
        return self.model_copy(update={name: {"path": str(place)} for name, place in places.items()})


class PackedSettings(TrainSettings):
    """Training on a fixed set of token trees, packed into rows of seq_len tokens."""

    batch_tokens: Annotated[int, Field(ge=32)]
    seq_len: Annotated[int, Field(ge=32)] = 512

    @computed_field  # type: ignore[prop-decorator]
    @property
    def batch_size(self) -> int:
        """Rows a step. Derived, and still part of every key: another derivation is another training."""
        return max(1, self.batch_tokens // self.seq_len)

    @model_validator(mode="after")
    def _batch_holds_a_row(self) -> Self:
        if self.batch_tokens < self.seq_len:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) holds no row of seq_len ({self.seq_len}): "
                "raise the one or lower the other"
            )
        return self

    def check_context(self, max_length: int) -> None:
        if self.seq_len > max_length:
            raise ValueError(f"seq_len ({self.seq_len}) is longer than base.max_length ({max_length})")

    def shape(self, max_length: int) -> tuple[int, int]:
        return self.micro_batch_size or self.batch_size, self.seq_len


class EpochSettings(PackedSettings):
    """Every record once an epoch."""

    epochs: Count = 1


class HeadSettings(EpochSettings):
    """Training of a head on the last token, and of the network below it."""

    @model_validator(mode="after")
    def _head_is_kept(self) -> Self:
        if self.lora and not self.lora.merge:
            raise ValueError("lora: an adapter has no place for the head; set merge: true, which makes a whole model")
        return self


class RewardSource(StrictModel):
    """One summand of a reward: `{verifier: 1.0}`, or `{model: reward, weight: 0.3}`."""

    verifier: Positive | None = None
    """The weight of the domain's verifier."""
    model: ModelName | None = None
    """A reward model: an earlier stage of the recipe that made one, a folder such as ./models/reward, or a version."""
    weight: Positive = 1.0
    """Of the model."""
    min_accuracy: Share = 0.5
    """Of the model, on pairs that it has not seen, by the lower end of the interval: below it nothing is trained."""
    max_hacking: Share = 0.0
    """Of the audit's wrong answers, the share that may score as high as the right one."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.verifier is None) == (self.model is None):
            raise ValueError("a reward is {verifier: weight} or {model: stage or folder, weight: ...}")
        if self.model is None and self.weight != 1:
            raise ValueError("weight is that of a model; the verifier's is {verifier: weight}")
        defaults = [type(self).model_fields[name].default for name in ("min_accuracy", "max_hacking")]
        if self.model is None and [self.min_accuracy, self.max_hacking] != defaults:
            raise ValueError("min_accuracy and max_hacking are limits of a model")
        return self


class RolloutSettings(TrainSettings):
    """Training on what the network itself samples: answers to prompts, and what they earn."""

    steps: Count
    """Optimizer steps; a rollout may be trained on in several."""
    prompts_per_step: Count
    """Prompts of a round, and groups of answers wanted that have a gradient: more prompts are drawn for the others."""
    group_size: Count = 1
    """Answers to a prompt."""
    temperature: Positive = 1.0
    """Of sampling. At 0 a group would be one answer many times."""
    max_new_tokens: Count = 96
    rewards: Annotated[list[RewardSource], Field(min_length=1)] = [RewardSource(verifier=1.0)]
    """What an answer earns: their weighted sum."""
    stop_at_reward: float | None = None
    """End before `steps` once the last five rollouts earned this on average. None: never."""

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        named = [source.model for source in self.rewards]  # None: the verifier
        if twice := next((name for name in named if name and named.count(name) > 1), None):
            text = " ".join(map(str, twice.values()))
            raise ValueError(f"rewards: the model {text} is named twice; give it one weight")
        if named.count(None) > 1:
            raise ValueError("rewards: the verifier is named twice; give it one weight")
        return self

    @model_validator(mode="after")
    def _minibatches_hold_groups(self) -> Self:
        _, minibatches = self.passes()
        if minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches ({minibatches}) are of whole groups; take at most prompts_per_step "
                f"({self.prompts_per_step})"
            )
        return self

    def passes(self) -> tuple[int, int]:
        """(epochs, minibatches): how often a rollout is gone through, and in how many steps each time."""
        return 1, 1

    def needs_verifier(self) -> bool:
        return any(source.verifier is not None for source in self.rewards)

    def keyed(self) -> dict[str, Any]:
        return self.model_dump(exclude={"rewards": {"__all__": {"min_accuracy", "max_hacking"}}})

    def reward_models(self) -> dict[str, RewardSource]:
        return {_model_of_reward(index): each for index, each in enumerate(self.rewards) if each.model is not None}

    def named_models(self) -> dict[str, NamedModel]:
        return {
            setting: NamedModel(source.model, kind="reward")
            for setting, source in self.reward_models().items()
            if source.model is not None
        }

    def with_models(self, places: Mapping[str, Path]) -> Self:
        rewards, others = list(self.rewards), dict(places)
        for index, source in enumerate(rewards):
            if place := others.pop(_model_of_reward(index), None):
                rewards[index] = source.model_copy(update={"model": {"path": str(place)}})
        return super().with_models(others).model_copy(update={"rewards": rewards})

    def check_context(self, max_length: int) -> None:
        if self.max_new_tokens >= max_length:
            raise ValueError(
                f"max_new_tokens ({self.max_new_tokens}) leaves no tokens for a prompt in "
                f"base.max_length ({max_length})"
            )

    def shape(self, max_length: int) -> tuple[int, int]:
        """A row holds a whole tree: the longest prompt, and all its answers."""
        _, minibatches = self.passes()
        tree = max_length + (self.group_size - 1) * self.max_new_tokens
        return self.micro_batch_size or math.ceil(self.prompts_per_step / minibatches), tree

    def answer_tokens(self) -> int:
        return self.max_new_tokens


def _model_of_reward(index: int) -> str:
    return f"rewards[{index}].model"
