"""The decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP, optionally tied embeddings.

What else a family needs (windows, norms after the sublayers, soft-capping) is a field of `DecoderConfig`. Module names
are Hugging Face's, so a state dict is a checkpoint of `transformers` without any conversion.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from twinloop.models.config import DecoderConfig
from twinloop.models.rope import Rope


@cache
def _flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled: in eager mode it would materialise every score. Lazy: torch.compile imports for 2 s.

    Each number of rows and length of a row is a kernel of its own. Past torch's default of 8 it would quietly give up
    compiling; the stages of one run together need more.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, inverse, weight = ctx.saved_tensors
        (gradient,) = gradients
        d_weight = (gradient * normal).flatten(0, -2).sum(0)
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


def within_window(mask: Tensor | BlockMask | None, positions_BL: Tensor, window: int) -> Tensor | BlockMask:
    """The mask with only the last `window` positions before each token left, itself among them.

    Positions go on from a segment's parent, so that the distance is that along the token's own path.
    """
    if isinstance(mask, BlockMask):
        rows, length = positions_BL.shape
        sees = mask.mask_mod

        def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(b, h, q, k) & (positions_BL[b, q] - positions_BL[b, k] < window)

        return create_block_mask(near, rows, None, length, length, device=positions_BL.device)
    near_BLL = positions_BL[:, :, None] - positions_BL[:, None, :] < window
    if mask is None:
        return near_BLL.tril()[:, None]
    return mask & near_BLL[:, None]


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, plus_one=config.norm_plus_one)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, plus_one=config.norm_plus_one)
        self.qk_norm = config.qk_norm
        self.scale, self.softcap = config.query_scale, config.attention_softcap

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | BlockMask | None) -> Tensor:
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
        attended = attend(q_BHLE, k_BKLE, v_BKLE, mask, scale=self.scale, softcap=self.softcap)
        return self.o_proj(attended.transpose(1, 2).reshape(B, L, -1))


def attend(
    q_BHLE: Tensor,
    k_BKLE: Tensor,
    v_BKLE: Tensor,
    mask: Tensor | BlockMask | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention [B, H, L, E]. mask: as in `Decoder.hidden`. scale: 1 / sqrt(E) by default."""
    if isinstance(mask, BlockMask):
        cap = None if softcap is None else _capped_scores(softcap)
        return _flex_attention()(q_BHLE, k_BKLE, v_BKLE, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=True)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q_BHLE, k_BKLE, v_BKLE, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    # No kernel of torch's caps scores outside of FlexAttention.
    groups = q_BHLE.shape[1] // k_BKLE.shape[1]
    k_BHLE, v_BHLE = (x.repeat_interleave(groups, dim=1) for x in (k_BKLE, v_BKLE))
    scores_BHLL = (q_BHLE @ k_BHLE.transpose(2, 3)).float() * (scale or q_BHLE.shape[-1] ** -0.5)
    visible = torch.ones_like(scores_BHLL[0, 0], dtype=torch.bool).tril() if mask is None else mask
    scores_BHLL = soft_cap(scores_BHLL, softcap).masked_fill(~visible, float("-inf"))
    return scores_BHLL.softmax(dim=-1).to(v_BHLE.dtype) @ v_BHLE


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


@cache
def _capped_scores(cap: float) -> Callable[..., Tensor]:
    """FlexAttention compiles once for each function that it gets."""
    return lambda score, b, h, q, k: soft_cap(score, cap)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.activation = config.activation

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate = self.gate_proj(x_BLD)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * self.up_proj(x_BLD))


class Layer(nn.Module):
    """With `post_norms`, the norm after attention is `post_attention_layernorm`; else that is the one before the MLP,
    as Hugging Face's checkpoints name them."""

    def __init__(self, config: DecoderConfig):
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, plus_one=config.norm_plus_one)

        self.input_layernorm = norm()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm()
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        self.mlp = MLP(config)
        self.post_norms = config.post_norms

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | BlockMask | None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BLD), rotary, mask)
        if self.post_norms:
            x_BLD = x_BLD + self.post_attention_layernorm(attended)
            return x_BLD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BLD)))
        x_BLD = x_BLD + attended
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Backbone(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, plus_one=config.norm_plus_one)


class Decoder(nn.Module):
    """The network. Vocabulary logits are a separate call: training projects only scored positions."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights at 1/sqrt(fan-in); what writes into the residual stream starts smaller with depth."""
        depth_scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "embed_tokens" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std * depth_scale if name.endswith(_RESIDUAL_OUTPUTS) else std)

    def hidden(self, tokens_BL: Tensor, positions_BL: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """Final hidden states [B, L, D].

        tokens_BL, positions_BL: int64. mask: None (causal), bool [B, 1, L, L] (True attends) or a BlockMask (CUDA).
        """
        x_BLD = self.embedded(tokens_BL)
        kinds = self.config.layer_kinds
        tables: dict[Rope | None, tuple[Tensor, Tensor] | None] = {
            rope: None if rope is None else rotary_tables(positions_BL, self.config.head_dim, rope)
            for rope in {kind.rope for kind in kinds}
        }
        masks: dict[int | None, Tensor | BlockMask | None] = {
            window: within_window(mask, positions_BL, window) if window else mask
            for window in {k.window for k in kinds}
        }
        for layer, kind in zip(self.model.layers, kinds, strict=True):
            x_BLD = layer(x_BLD, tables[kind.rope], masks[kind.window])
        return self.model.norm(x_BLD)

    def embedded(self, tokens_BL: Tensor) -> Tensor:
        """What the first layer reads [B, L, D]."""
        x_BLD = self.model.embed_tokens(tokens_BL)
        scale = self.config.embedding_scale
        return x_BLD if scale == 1 else x_BLD * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., V] of hidden states [..., D]."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        logits = F.linear(hidden, weight.to(hidden.dtype))
        cap = self.config.logit_softcap
        return logits if cap is None else soft_cap(logits, cap)


_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
