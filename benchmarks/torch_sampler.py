"""The same network sampled in plain PyTorch with a key-value cache: what the bound engine is measured against.

A fair one: prompts computed once a group, a preallocated cache, one batched step for all rows, the next token drawn by
inversion from the same draws, log-probabilities kept, finished rows dropped when half are.

B rows, L positions, D width, H query heads, K key-value heads, M cache positions, E head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twinloop.models.decoder import Attention, Decoder, Layer, rotary_tables, rotate
from twinloop.models.rope import Rope
from twinloop.serving.engine.sampling import SamplingParams, uniform_draws

Cache = list[tuple[Tensor, Tensor]]


class TorchSampler:
    def __init__(self, network: Decoder):
        self.network, self.config = network, network.config
        self.device = network.model.norm.weight.device

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, group: int) -> list[list[int]]:
        """Answers, as Engine.generate orders them; top_p is not looked at."""
        max_tokens = params.max_tokens
        logits_BV, cache, length_B = self._prompts(prompts, group, max_tokens)
        rows = len(length_B)
        draws = torch.from_numpy(np.stack([uniform_draws(params.seed, row, max_tokens) for row in range(rows)]))
        draws = draws.to(self.device)
        stops_V = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
        stops_V[list(params.stop)] = True
        tokens_BT = torch.zeros(rows, max_tokens, dtype=torch.long, device=self.device)
        logprobs_BT = torch.zeros(rows, max_tokens, device=self.device)
        answered_B = torch.zeros(rows, dtype=torch.long, device=self.device)
        row_B = torch.arange(rows, device=self.device)  # the sequence that a row of the batch belongs to
        alive_B = torch.ones(rows, dtype=torch.bool, device=self.device)
        for step in range(max_tokens):
            next_B = _choose(logits_BV, draws[row_B, step], params.temperature)
            logprobs_BT[row_B, step] = torch.log_softmax(logits_BV, dim=-1).gather(1, next_B[:, None])[:, 0]
            tokens_BT[row_B, step] = next_B
            answered_B[row_B] += alive_B
            alive_B = alive_B & ~stops_V[next_B]
            living = int(alive_B.sum())
            if living == 0 or step + 1 == max_tokens:
                break
            if living <= len(alive_B) // 2:
                cache = [(keys[alive_B], values[alive_B]) for keys, values in cache]
                next_B, length_B, row_B = next_B[alive_B], length_B[alive_B], row_B[alive_B]
                alive_B = alive_B[alive_B]
            hidden = self._forward(next_B[:, None], length_B[:, None], cache, reach=int(length_B.max()) + 1)
            logits_BV = self.network.logits(hidden[:, 0])
            length_B = length_B + 1
        return [row[:count].tolist() for row, count in zip(tokens_BT, answered_B.tolist(), strict=True)]

    def _prompts(self, prompts: Sequence[Sequence[int]], group: int, max_tokens: int) -> tuple[Tensor, Cache, Tensor]:
        """Each prompt once, then a copy for each member of its group: logits, cache, lengths."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(lengths.max())
        shape = (len(prompts), self.config.num_key_value_heads, longest + max_tokens, self.config.head_dim)
        cache = [
            (torch.zeros(shape, device=self.device), torch.zeros(shape, device=self.device))
            for _ in self.network.model.layers
        ]
        tokens_BL = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):
            tokens_BL[row, : len(prompt)] = torch.tensor(prompt)
        positions_BL = torch.arange(longest, device=self.device).expand(len(prompts), -1)
        hidden = self._forward(tokens_BL, positions_BL, cache, reach=None)[torch.arange(len(prompts)), lengths - 1]
        copies = [
            (keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)) for keys, values in cache
        ]
        logits_BV = self.network.logits(hidden).repeat_interleave(group, dim=0)
        return logits_BV, copies, lengths.repeat_interleave(group)

    def _forward(self, tokens_BL: Tensor, positions_BL: Tensor, cache: Cache, *, reach: int | None) -> Tensor:
        """Hidden states [B, L, D]; keys and values are written at their positions. reach None: a first prompt."""
        network = self.network
        x_BLD = network.model.embed_tokens(tokens_BL)
        cos, sin = rotary_tables(positions_BL, self.config.head_dim, Rope(theta=self.config.rope_theta))
        mask = None
        if reach is not None:
            mask = (torch.arange(reach, device=self.device) <= positions_BL)[:, None, None]
        for layer, (keys_BKME, values_BKME) in zip(network.model.layers, cache, strict=True):
            assert isinstance(layer, Layer)
            q, k, v = _heads(layer.self_attn, layer.input_layernorm(x_BLD), cos, sin)
            rows = torch.arange(len(tokens_BL), device=self.device)[:, None]
            keys_BKME[rows, :, positions_BL] = k.transpose(1, 2)
            values_BKME[rows, :, positions_BL] = v.transpose(1, 2)
            if reach is not None:
                k, v = keys_BKME[:, :, :reach], values_BKME[:, :, :reach]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            x_BLD = x_BLD + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
            x_BLD = x_BLD + layer.mlp(layer.post_attention_layernorm(x_BLD))
        return network.model.norm(x_BLD)


def _heads(attention: Attention, normed_BLD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, L, E], keys and values [B, K, L, E], as the network makes them."""
    shape = (*normed_BLD.shape[:2], -1, attention.head_dim)
    q = attention.q_proj(normed_BLD).view(shape).transpose(1, 2)
    k = attention.k_proj(normed_BLD).view(shape).transpose(1, 2)
    v = attention.v_proj(normed_BLD).view(shape).transpose(1, 2)
    if attention.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _choose(logits_BV: Tensor, draws_B: Tensor, temperature: float) -> Tensor:
    if not temperature:
        return logits_BV.argmax(dim=-1)
    cumulative_BV = torch.softmax(logits_BV / temperature, dim=-1).cumsum(-1)
    drawn_B = (cumulative_BV < draws_B[:, None] * cumulative_BV[:, -1:]).sum(-1)
    return drawn_B.clamp(max=logits_BV.shape[-1] - 1)
