"""The decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP, optionally tied embeddings.

What else a family needs (windows, norms after the sublayers, soft-capping) is a field of `DecoderConfig`. Module names
are Hugging Face's, so a state dict is a checkpoint of `transformers` without any conversion.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinloop.models.attention import AttentionPlan, CausalRows, Scores
from twinloop.models.config import DecoderConfig, LayerKind
from twinloop.models.products import Linear, linear
from twinloop.models.rope import Rope
from twinloop.models.shapes import HEAD


class _CPURMSNorm(torch.autograd.Function):
    """Eight passes over memory, forward and backward, where autograd through torch's composite takes about twenty.

    CPU only: CUDA has a fused kernel. At width 128 a training step takes a tenth less.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normal, inverse, weight = ctx.saved_tensors
        (gradient,) = gradients
        d_weight = (gradient * normal).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        d_normal = gradient * weight
        along = (d_normal * normal).mean(-1, keepdim=True)
        return d_normal.addcmul_(normal, along, value=-1).mul_(inverse), d_weight, None


class RMSNorm(nn.Module):
    """plus_one: multiply by 1 + the weight, which then starts at 0."""

    def __init__(self, width: int, eps: float, *, plus_one: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.eps = eps
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight if self.plus_one else self.weight
        if x.device.type == "cpu" and x.dtype == torch.float32:
            return _CPURMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)


def rotary_tables(positions_BL: Tensor, head_dim: int, rope: Rope) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, L, E] of every position, float32, the two halves alike (Su et al., 2021)."""
    device = positions_BL.device
    frequencies = rope.theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    factors = rope.frequency_factors(head_dim)
    if factors is not None:
        frequencies = frequencies * torch.from_numpy(factors).to(device)
    angles = positions_BL[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHLE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) by its position's angle."""
    first, second = x_BHLE.chunk(2, dim=-1)
    return (x_BHLE * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BHLE.dtype)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, kind: LayerKind):
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, width, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, plus_one=config.norm_plus_one)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, plus_one=config.norm_plus_one)
        self.qk_norm = config.qk_norm
        self.scores = Scores(
            scale=config.query_scale or config.head_dim**-0.5, window=kind.window, softcap=config.attention_softcap
        )

    @torch.no_grad()
    def begin_keys_as_queries(self) -> None:
        """A key head takes the weights of the first query head of its group."""
        heads = len(self.q_proj.weight) // self.head_dim
        group = heads * self.head_dim // len(self.k_proj.weight)
        queries_HED = self.q_proj.weight.view(heads, self.head_dim, -1)
        self.k_proj.weight.copy_(queries_HED[::group].flatten(0, 1))

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None, plan: AttentionPlan) -> Tensor:
        """rotary: cosines and sines, as `rotary_tables` gives them; None: without positions."""
        B, L, _ = x_BLD.shape
        q_BHLE = self.q_proj(x_BLD).view(B, L, -1, self.head_dim).transpose(1, 2)
        k_BKLE = self.k_proj(x_BLD).view(B, L, -1, self.head_dim).transpose(1, 2)
        v_BKLE = self.v_proj(x_BLD).view(B, L, -1, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q_BHLE, k_BKLE = self.q_norm(q_BHLE), self.k_norm(k_BKLE)
        if rotary is not None:
            q_BHLE, k_BKLE = (rotate(x, *rotary) for x in (q_BHLE, k_BKLE))
        # Autocast norms in float32; attention wants queries, keys and values alike.
        q_BHLE, k_BKLE = (x.to(v_BKLE.dtype) for x in (q_BHLE, k_BKLE))
        attended = plan.attend(q_BHLE, k_BKLE, v_BKLE, self.scores)
        return self.o_proj(attended.transpose(1, 2).reshape(B, L, -1))


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)
        self.activation = config.activation

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate = self.gate_proj(x_BLD)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * self.up_proj(x_BLD))


class Layer(nn.Module):
    """With `post_norms`, the norm after attention is `post_attention_layernorm`; else that is the one before the MLP,
    as Hugging Face's checkpoints name them."""

    def __init__(self, config: DecoderConfig, kind: LayerKind):
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, plus_one=config.norm_plus_one)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, kind)
        self.post_attention_layernorm = norm()
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        self.mlp = MLP(config)
        self.post_norms = config.post_norms

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None, plan: AttentionPlan) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BLD), rotary, plan)
        if self.post_norms:
            x_BLD = x_BLD + self.post_attention_layernorm(attended)
            return x_BLD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BLD)))
        x_BLD = x_BLD + attended
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Backbone(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_kinds)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, plus_one=config.norm_plus_one)


class Decoder(nn.Module):
    """The network. Vocabulary logits are a separate call: training projects only scored positions."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if config.labels:
            self.score = nn.Linear(config.hidden_size, len(config.labels), bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights at 1/sqrt(fan-in); what writes into the residual stream starts smaller with depth."""
        depth_scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == HEAD:
                nn.init.zeros_(parameter)
            elif "embed_tokens" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std * depth_scale if name.endswith(_RESIDUAL_OUTPUTS) else std)

    def begin_keys_as_queries(self) -> None:
        """A token then first attends to tokens like itself (Trockman and Kolter, 2023)."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.begin_keys_as_queries()

    def hidden(self, tokens_BL: Tensor, positions_BL: Tensor, plan: AttentionPlan | None = None) -> Tensor:
        """Final hidden states [B, L, D].

        tokens_BL, positions_BL: int64. plan: who sees whom; None: each row is one sequence.
        """
        plan = plan or CausalRows()
        x_BLD = self.embedded(tokens_BL)
        kinds = self.config.layer_kinds
        tables: dict[Rope | None, tuple[Tensor, Tensor] | None] = {
            rope: None if rope is None else rotary_tables(positions_BL, self.config.head_dim, rope)
            for rope in {kind.rope for kind in kinds}
        }
        for layer, kind in zip(self.model.layers, kinds, strict=True):
            x_BLD = layer(x_BLD, tables[kind.rope], plan)
        return self.model.norm(x_BLD)

    def embedded(self, tokens_BL: Tensor) -> Tensor:
        """What the first layer reads [B, L, D]."""
        x_BLD = self.model.embed_tokens(tokens_BL)
        scale = self.config.embedding_scale
        return x_BLD if scale == 1 else x_BLD * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., V] of hidden states [..., D]; of a network with labels, theirs, in float32."""
        if self.config.labels:
            with torch.autocast(hidden.device.type, enabled=False):
                return F.linear(hidden.float(), self.score.weight.float())
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        logits = linear(hidden, weight.to(hidden.dtype))
        cap = self.config.logit_softcap
        return logits if cap is None else soft_cap(logits, cap)


_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
