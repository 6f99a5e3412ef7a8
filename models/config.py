"""The one description of a network: what the families of `models/families/` read their config.json into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from twinloop.models.rope import Rope, RopeScaling, Scale
from twinloop.models.shapes import weight_shapes

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
"""Of an exported model's weights and arithmetic."""

Kind = Literal["text", "labels", "reward"]
"""What a network gives: the next token of a text, one label of several, or a score."""
KIND_NAMES: Mapping[Kind, str] = {
    "text": "a model that writes text",
    "labels": "a classifier",
    "reward": "a reward model",
}
"""A network that gives this, in words."""


def kind_of(labels: Sequence[str]) -> Kind:
    """labels: of its head, where it has one: a reward model has one label."""
    if not labels:
        return "text"
    return "labels" if labels[1:] else "reward"


Size = Annotated[int, Field(gt=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, le=10_000)]
"""Every list by layer is of this length, so that a corrupt config.json must not make it endless."""

HEAD_DIM_UNIT = 16
"""ONNX Runtime's GroupQueryAttention with rotary positions asks for it (1.31): what is trained must be served."""


@dataclass(frozen=True)
class LayerKind:
    """How one layer attends. window: positions that a token sees, itself among them; None: all before it.
    rope: None where the layer does not look at positions."""

    window: int | None
    rope: Rope | None


class DecoderConfig(BaseModel):
    """Sizes and constants of the network, in words of no family: the first fields have Hugging Face's usual names.

    A default is what a plain Llama does, so a new field changes nothing for a network that does not use it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size = 2048
    rms_norm_eps: Scale = 1e-5
    rope_theta: Scale = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 5
    pad_token_id: int | None = 0
    family: str | None = None
    """Hugging Face's model_type, where it is not the one that the biases and norms tell."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_output_bias: bool = False
    mlp_bias: bool = False
    norm_plus_one: bool = False
    """Whether a norm multiplies by 1 + its weight."""
    post_norms: bool = False
    """Whether the outputs of attention and MLP are normed too, before they are added to the residual stream."""
    embedding_scale: Scale = 1.0
    query_scale: Scale | None = None
    """What attention scores are multiplied with; by default 1 / sqrt(head_dim)."""
    attention_softcap: Scale | None = None
    """cap: scores, or logits, become cap * tanh(x / cap)."""
    logit_softcap: Scale | None = None
    windows: tuple[Size | None, ...] = ()
    """Of each layer, as `LayerKind.window`; none given: every layer sees all."""
    rotary_layers: tuple[bool, ...] = ()
    """Whether each layer turns its queries and keys by their positions; none given: all do."""
    window_rope: Rope | None = None
    """The angles of the layers with a window, where they differ from the others'."""
    labels: tuple[str, ...] = ()
    """What a head on a text's last token scores, in the place of the vocabulary: each label of a classifier, or the one
    score of a reward model. None: the network writes text."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % HEAD_DIM_UNIT:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be a multiple of {HEAD_DIM_UNIT}: the attention needs it"
            )
        for name in ("windows", "rotary_layers"):
            given = len(getattr(self, name))
            if given not in (0, self.num_hidden_layers):
                raise ValueError(f"{name} has {given} entries for num_hidden_layers ({self.num_hidden_layers})")
        return self

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture, which is that of the family's module."""
        if self.family is not None:
            return self.family
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.attention_bias else "llama"

    @property
    def kind(self) -> Kind:
        return kind_of(self.labels)

    @property
    def num_outputs(self) -> int:
        """Logits of a position: of the vocabulary, or of the labels."""
        return len(self.labels) or self.vocab_size

    @property
    def rope(self) -> Rope:
        """The angles of the layers without a window, and of those with one unless they have their own."""
        return Rope(theta=self.rope_theta, scaling=self.rope_scaling)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer. A window that reaches over every position is none."""
        rope = self.rope
        windows = self.windows or (None,) * self.num_hidden_layers
        rotary = self.rotary_layers or (True,) * self.num_hidden_layers
        return tuple(
            LayerKind(
                window=window if window is not None and window < self.max_position_embeddings else None,
                rope=(rope if window is None else self.window_rope or rope) if turns else None,
            )
            for window, turns in zip(windows, rotary, strict=True)
        )

    @property
    def num_parameters(self) -> int:
        """Trainable values, tied embeddings counted once."""
        return sum(math.prod(shape) for shape in weight_shapes(self).values())

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps, for one byte an element: multiply by the element's size."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
