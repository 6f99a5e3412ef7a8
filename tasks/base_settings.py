"""How a recipe names a model: the key `base`, a new network or a model that is there already; and what stages read
besides, which earlier stages may make.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from twinloop.models.config import HEAD_DIM_UNIT, DecoderConfig
from twinloop.training.settings import Count, StrictModel

Length = Annotated[int, Field(ge=32)]
AnyModel = TypeVar("AnyModel", bound=StrictModel)


class BaseSettings(StrictModel):
    """max_length: tokens of prompt and answer together, in training, evaluation and serving. None: the source says."""

    max_length: Length | None


class NewBase(BaseSettings):
    """A new network: `depth` derives every size, and a size beside it overrides what was derived; and its tokenizer."""

    depth: Annotated[int, Field(ge=1, le=128)]
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    max_length: Length = 512
    qk_norm: bool = False
    keys_as_queries: bool = False
    """Begin with keys that are the queries of their head. Copying is learned sooner, where a network learns it from
    millions of tokens; in a short training from nothing other things are learned later, or not at all."""
    vocab_size: Annotated[int, Field(ge=262, le=262144)] = 512
    """At least the 256 bytes and the 6 special tokens; the tokenizer may find fewer."""

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The shape of the network: two query heads share a key-value head."""
        width = self.width
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
            raise ValueError(self._in_own_words(error)) from None
        return self

    def _in_own_words(self, error: ValidationError) -> str:
        """What the network cannot be, by the settings that a recipe has: `head_dim` is none of them."""
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        width, heads = self.width, self.num_attention_heads
        if heads and (width < heads or width // heads % HEAD_DIM_UNIT):
            return (
                f"num_attention_heads ({heads}) gives each head {width // heads} values of hidden_size ({width}), and "
                f"it must be a multiple of {HEAD_DIM_UNIT}"
            )
        return said

    @property
    def width(self) -> int:
        """hidden_size; where the recipe does not say, 32 a layer, and 64 beyond 16 layers."""
        return self.hidden_size or self.depth * (32 if self.depth <= 16 else 64)


class PathBase(BaseSettings):
    """A Hugging Face directory or a GGUF file, relative to the project."""

    path: Annotated[str, Field(min_length=1)]
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """A directory of an adapter of it, in PEFT's form, relative to the project; it is merged."""
    max_length: Length | None = None
    thinking: bool = False
    """Whether answers may begin with a thought. Without, the prompt has the empty one, where the chat template can."""
    date: Annotated[datetime.date, Field(strict=False)] = datetime.date(2024, 7, 26)
    """What the chat template writes as today's, in training and ever after: Llama's own where it has no clock."""


class PackageBase(PathBase):
    """The same, its `path` within an installed Python package."""

    package: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _version(value: Any) -> Any:
    if (type(value) is int and value >= 1) or (isinstance(value, str) and value):
        return value
    raise ValueError("a version is a number from 1 on, or an alias such as champion")


class VersionBase(BaseSettings):
    """The checkpoint that a registered version was exported from: a number, or an alias such as champion."""

    version: Annotated[int | str, BeforeValidator(_version)]
    model: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] | None = None
    """The registered model; None: the recipe's own."""
    max_length: Length | None = None


class EarlierStage(StrictModel):
    """What an earlier stage of the recipe makes, by the stage's name. Not for `base`."""

    stage: Annotated[str, Field(min_length=1)]


KINDS: dict[str, type[BaseSettings]] = {
    "depth": NewBase,
    "package": PackageBase,
    "path": PathBase,
    "version": VersionBase,
}
"""By the key that only they must have; `package` comes with a `path`."""
TRAINED = "{path: ...} or {package: ..., path: ...} and {version: champion} take one"
FORMS = f"{{depth: 4}} makes a new network; {TRAINED}"


NAMED: dict[str, type[BaseSettings] | type[EarlierStage]] = {"stage": EarlierStage, **KINDS}
NAMED_FORMS = f"{{stage: sft}} takes what an earlier stage makes; {TRAINED}"


def kind_of_model(
    fields: Mapping[str, Any], place: str, kinds: Mapping[str, type[AnyModel]], forms: str
) -> type[AnyModel]:
    """The settings that these keys are meant for. Raises ValueError, in words for a recipe, where no key says so.
    place: where the recipe holds them. kinds: by the key that says so. forms: how a model is named there."""
    named = [key for key in kinds if key in fields and not (key == "path" and "package" in fields)]
    if len(named) > 1:
        raise ValueError(f"{place}: {' and '.join(named)} name different models; keep one of them")
    if named:
        return kinds[named[0]]
    for key in fields:
        if near := difflib.get_close_matches(str(key), list(kinds), n=1):
            raise ValueError(f"{place}.{key}: unknown key; did you mean {near[0]}?")
    raise ValueError(f"{place}: does not say which model; {forms}")
