"""A recipe: the settings of one whole pipeline, checked before anything runs.

Few settings. What can be derived is derived, and what nobody should change is a constant of its room. Imports neither
torch nor the libraries of any stage, so that a mistake is told at once.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import read_yaml
from twinloop.models.config import DecoderConfig, Precision

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
TOLD = 5
"""Mistakes told at once."""


class Section(BaseModel):
    """Strict: "8" is not 8, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class ModelSettings(Section):
    """The network: `depth` derives everything; a size given beside it overrides what was derived."""

    depth: Annotated[int, Field(ge=1, le=128)]
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    max_length: Annotated[int, Field(ge=32)] = 512
    qk_norm: bool = False

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The shape of the network: width 32 a layer up to 1024, then 64; two query heads share a key-value head."""
        width = self.hidden_size or self.depth * (32 if self.depth <= 16 else 64)
        head_dim = 32 if width < 512 else 64 if width < 2048 else 128
        heads = self.num_attention_heads or max(1, width // head_dim)
        if self.num_attention_heads:
            head_dim = width // heads
        kv_heads = self.num_key_value_heads or (heads // 2 if heads % 2 == 0 else heads)
        return DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=self.intermediate_size or width * 3,
            num_hidden_layers=self.depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=self.max_length,
            qk_norm=self.qk_norm,
        )

    @model_validator(mode="after")
    def _network_exists(self) -> Self:
        try:
            self.decoder_config(512)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self


class TokenizerSettings(Section):
    vocab_size: Annotated[int, Field(ge=262, le=262144)] = 512
    """At least the 256 bytes and the 6 special tokens."""


class ValidateSettings(Section):
    max_quarantined: Share = 0.01
    """Share of one file's rows that may be quarantined before the stage fails."""
    split_keys: list[str] = ["text"]
    """What training and held-out rows may not share: `text`, and keys that the domain defines."""


class Optimisation(Section):
    """Settings that every stage of training has."""

    learning_rate: Positive
    """The peak. Muon's updates are scaled to half the size of AdamW's, so one rate serves both."""
    micro_rows: Count | None = None
    """Rows that go through the network at once, where memory is short; the result is the same within rounding."""
    warmup: Share = 0.02
    decay: Share = 0.5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["muon", "adamw"] = "muon"

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup ({self.warmup}) and decay ({self.decay}) are shares of one run: together at most 1"
            )
        return self


class Packed(Optimisation):
    """Training on a fixed set of trees, packed into rows."""

    batch_tokens: Annotated[int, Field(ge=32)]
    row_length: Annotated[int, Field(ge=32)] = 512

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_per_step(self) -> int:
        """Derived, and still part of every key: another derivation is another training."""
        return max(1, self.batch_tokens // self.row_length)

    @model_validator(mode="after")
    def _batch_holds_a_row(self) -> Self:
        if self.batch_tokens < self.row_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) holds no row of row_length ({self.row_length}): "
                "raise the one or lower the other"
            )
        return self


class PretrainSettings(Packed):
    tokens: Count

    @computed_field  # type: ignore[prop-decorator]
    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.rows_per_step * self.row_length))


class FinetuneSettings(Packed):
    epochs: Count = 1


class PreferenceSettings(FinetuneSettings):
    beta: Positive = 0.1


class ReinforceSettings(Optimisation):
    steps: Count
    prompts_per_step: Count
    """Groups wanted a step; those whose rewards are all alike teach nothing, and more prompts are drawn for them."""
    group_size: Annotated[int, Field(ge=2)]
    updates_per_rollout: Count = 1
    temperature: Positive = 1.0
    max_new_tokens: Count = 96
    clip: Positive = 0.2
    kl: Annotated[float, Field(ge=0)] = 0.0


class EvaluateSettings(Section):
    stage_cases: Count = 200
    """Held-out cases that each stage of training is measured on; the evaluation itself takes them all."""
    max_new_tokens: Count = 160
    slots: Annotated[int, Field(ge=1, le=1024)] = 16
    samples: Count = 1
    """1: greedy answers only. More: so many answers a case are sampled too, for the domain's metrics (pass@k)."""
    temperature: Positive = 1.0
    """Of sampled answers."""


class ExportSettings(Section):
    precisions: Annotated[list[Precision], Field(min_length=1)] | None = None
    """The first is served. None: fp32 and int8 on CPU, fp16 and bf16 on CUDA, which runs no other.

    fp16 first: its logits stay nine times nearer to the network's than bf16's, and within the gate's limit."""

    def on(self, device: str) -> list[Precision]:
        return self.precisions or (["fp16", "bf16"] if device == "cuda" else ["fp32", "int8"])

    def only_on_cuda(self) -> Precision | None:
        """The first precision asked for that the engine does not run on CPU."""
        return next((each for each in self.precisions or [] if each in ("fp16", "bf16")), None)


class GateSettings(Section):
    rules: str = "recipes/gate.yaml"
    """File with the release rules, relative to the project."""


class Recipe(Section):
    """One pipeline. Each stage receives its own section and nothing else."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Also the name of the registered model."""
    domain: str
    """What the model is for: a ready-made domain, an importable module, or a file such as ./tickets.py."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 20.0
    """What a crash may cost. Changes no result."""
    model: ModelSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    validate_: Annotated[ValidateSettings, Field(alias="validate")] = ValidateSettings()
    pretrain: PretrainSettings
    sft: FinetuneSettings
    dpo: PreferenceSettings
    rlvr: ReinforceSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings = ExportSettings()
    gate: GateSettings = GateSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in ("rlvr", "evaluate"):
            longest = getattr(self, name).max_new_tokens
            if longest >= self.model.max_length:
                raise ValueError(
                    f"{name}.max_new_tokens ({longest}) leaves no room for a prompt in "
                    f"model.max_length ({self.model.max_length})"
                )
        if self.device == "cpu" and (wrong := self.export.only_on_cuda()):
            raise ValueError(f"export.precisions has {wrong}, which only CUDA runs, and device is cpu")
        for name in ("pretrain", "sft"):  # a row of trees may be longer: positions count along a branch
            row_length = getattr(self, name).row_length
            if row_length > self.model.max_length:
                raise ValueError(
                    f"{name}.row_length ({row_length}) is longer than model.max_length ({self.model.max_length})"
                )
        return self


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises UserError: one line with the file, the key, and what is allowed there."""
    fields = read_yaml(path, "recipes are YAML files such as recipes/returns.yaml")
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, such as `pretrain: {{tokens: 1000000, ...}}`")
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        # What stands there and is unknown explains what is missing.
        found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        problems = [_explain(dict(problem), fields) for problem in found[:TOLD]]
        raise UserError(f"{path}: {'; '.join(problems)}") from None


def _explain(problem: dict[str, Any], fields: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key, context = ".".join(location), problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        known = _keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default"
    value: Any = fields
    for part in problem["loc"]:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
            break
    if problem["type"] == "literal_error":
        near = difflib.get_close_matches(str(value), [w.strip("' ") for w in re.split(r",| or ", context["expected"])])
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key}: {value!r} is not one of {context['expected'].replace(' or ', ', ')}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {value!r}: {message[0].lower()}{message[1:]}"


def _keys(location: list[str]) -> list[str]:
    """The keys that a section knows."""
    section: type[BaseModel] = Recipe
    for part in location:
        found = next((f for name, f in section.model_fields.items() if part in (name, f.alias)), None)
        if found is None or not (isinstance(found.annotation, type) and issubclass(found.annotation, BaseModel)):
            return []
        section = found.annotation
    return [found.alias or name for name, found in section.model_fields.items()]
