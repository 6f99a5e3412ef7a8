"""The shape of a Llama-family decoder, in Hugging Face's words."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twinloop.common.errors import UserError
from twinloop.models.shapes import weight_shapes

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
"""Of an exported model's weights and arithmetic."""

Size = Annotated[int, Field(gt=0)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DecoderConfig(BaseModel):
    """Sizes and constants of the network. Field names are those of Hugging Face's `config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size = 2048
    rms_norm_eps: Scale = 1e-5
    rope_theta: Scale = 10000.0
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 5
    pad_token_id: int = 0

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 8:
            raise ValueError(f"head_dim ({self.head_dim}) must be a multiple of 8: the attention kernels need it")
        return self

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture that has these biases and norms."""
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.attention_bias else "llama"

    @property
    def num_parameters(self) -> int:
        """Trainable values, tied embeddings counted once."""
        return sum(math.prod(shape) for shape in weight_shapes(self).values())

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps, for one byte an element: multiply by the element's size."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def to_huggingface(self) -> dict[str, Any]:
        """The content of `config.json`, as `transformers` reads it."""
        fields = self.model_dump(exclude={"qk_norm"})
        if self.model_type != "llama":
            fields.pop("attention_bias")
            if self.model_type == "qwen3":
                fields["attention_bias"] = self.attention_bias
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "torch_dtype": "float32",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            **fields,
        }

    @classmethod
    def from_huggingface(cls, fields: Any) -> DecoderConfig:
        """Read the content of a `config.json` of a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

        Raises UserError for a field that is missing or of a wrong type, and for what the network does not have: another
        architecture or activation, rotary scaling, attention within a sliding window.
        """
        if not isinstance(fields, dict):
            raise UserError(f"config.json: it holds a {type(fields).__name__}, not an object with the model's sizes")
        _refuse_foreign(fields)
        model_type, eos, rope = fields["model_type"], fields.get("eos_token_id"), _rope(fields)
        width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
        known = {name: fields[name] for name in cls.model_fields if fields.get(name) is not None}
        known.setdefault("num_key_value_heads", heads)
        if _is_size(width) and _is_size(heads):
            known.setdefault("head_dim", width // heads)
        if "rope_theta" in rope:
            known.setdefault("rope_theta", rope["rope_theta"])
        known |= {
            "tie_word_embeddings": known.get("tie_word_embeddings", False),
            "attention_bias": model_type == "qwen2" or known.get("attention_bias", False),
            "qk_norm": model_type == "qwen3",
        }
        if isinstance(eos, list) and eos:
            known["eos_token_id"] = eos[0]
        try:
            config = cls(**known)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f" {part}:" for part in first["loc"])
            raise UserError(f"config.json:{where} {first['msg'].removeprefix('Value error, ')}") from None
        _refuse_sliding_window(fields, config.max_position_embeddings)
        return config


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters: {rope!r} is not an object")
    return rope


def _refuse_foreign(fields: dict[str, Any]) -> None:
    """Raise UserError for what would load, or fail late, and compute something else."""
    if fields.get("model_type") not in (*ARCHITECTURES, "mistral"):
        raise UserError(
            f"config.json: model_type {fields.get('model_type')!r} is not one of llama, mistral, qwen2, qwen3"
        )
    rope = _rope(fields)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"config.json: rotary scaling {rope!r} is not supported; use a checkpoint without it")
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {fields['hidden_act']!r} is not supported; only silu is")


def _refuse_sliding_window(fields: dict[str, Any], positions: int) -> None:
    """Our attention reaches every position. Llama has no window, Qwen and Mistral have one where the config sets it."""
    window = fields.get("sliding_window")
    used = fields["model_type"] == "mistral" or bool(fields.get("use_sliding_window", False))
    if fields["model_type"] == "llama" or not used or window is None:
        return
    if not _is_size(window) or window < positions:
        raise UserError(
            f"config.json: sliding_window {window!r} is shorter than max_position_embeddings ({positions}), and the "
            "network attends to every position; lower max_position_embeddings to it, or use a checkpoint without it"
        )
