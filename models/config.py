"""The shape of a Llama-family decoder, in Hugging Face's words."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from models.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class DecoderConfig(BaseModel):
    """Sizes and constants of the network. Field names are those of Hugging Face's `config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
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
        width, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        attention = 2 * width * self.head_dim * (heads + kv_heads)
        if self.attention_bias:
            attention += self.head_dim * (heads + 2 * kv_heads)
        if self.qk_norm:
            attention += 2 * self.head_dim
        layer = attention + 3 * width * self.intermediate_size + 2 * width
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + width

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
    def from_huggingface(cls, fields: dict[str, Any]) -> DecoderConfig:
        """Read a `config.json` of a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

        Raises UserError for an architecture, a rotary scaling or an activation that the network does not have.
        """
        model_type = fields.get("model_type")
        if model_type not in (*ARCHITECTURES, "mistral"):
            raise UserError(f"config.json: model_type {model_type!r} is not one of llama, mistral, qwen2, qwen3")
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"config.json: rotary scaling {rope!r} is not supported; use a checkpoint without it")
        if fields.get("hidden_act", "silu") != "silu":
            raise UserError(f"config.json: hidden_act {fields['hidden_act']!r} is not supported; only silu is")
        heads = fields["num_attention_heads"]
        eos = fields.get("eos_token_id")
        known = {name: fields[name] for name in cls.model_fields if fields.get(name) is not None}
        known |= {
            "num_key_value_heads": fields.get("num_key_value_heads") or heads,
            "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
            "rope_theta": fields.get("rope_theta") or rope.get("rope_theta", 10000.0),
            "tie_word_embeddings": fields.get("tie_word_embeddings", False),
            "attention_bias": model_type == "qwen2" or bool(fields.get("attention_bias", False)),
            "qk_norm": model_type == "qwen3",
        }
        if isinstance(eos, list):
            known["eos_token_id"] = eos[0]
        return cls(**known)
