"""Attention over a batch of token trees: what is computed is what is visible, not whole rows.

A plan says who sees whom; it is made once a batch and serves all layers, whatever their window. Positions go on from a
parent's end, so along the path from the root to a token every plan is plain causal attention, and a window is a
distance on that path.

Shapes: letters as in `models.shapes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Span = tuple[int, int]
"""Indexes of adjacent tokens: the first, and the one after the last."""


@dataclass(frozen=True)
class Scores:
    """What a layer makes of queries and keys.

    scale: what their products are multiplied with. window: positions that a token sees, itself among them; None: all
    before it. softcap: scores become softcap * tanh(score / softcap).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionPlan(Protocol):
    def attend(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, scores: Scores) -> Tensor:
        """The mixed values [B, H, L, E]."""
        ...


class CausalRows:
    """Each row is one sequence."""

    def attend(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, scores: Scores) -> Tensor:
        length, window = q_BHLE.shape[2], scores.window
        narrow = window is not None and window < length
        mask = _path_mask(length, length, window, q_BHLE) if narrow or scores.softcap else None
        if mask is not None and scores.softcap:
            return _softcapped(q_BHLE, k_BKLE, v_BKLE, mask, scores.scale, scores.softcap)
        return F.scaled_dot_product_attention(
            q_BHLE, k_BKLE, v_BKLE, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=True
        )


@dataclass(frozen=True)
class Path:
    """Adjacent tokens that see themselves, causally, and all of what precedes them on their path.

    queries: those tokens. before: the rest of their path, from the root, adjacent spans joined.
    """

    queries: Span
    before: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        return (*self.before, self.queries)

    @property
    def num_queries(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def num_keys(self) -> int:
        return sum(end - begin for begin, end in self.spans)


class TreePaths:
    """All trees of a batch in one row (B = 1), each path by itself: no padding, and no score that is masked away.

    For CPU, whose attention kernel is as fast on one short sequence as on a batch of them.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def attend(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, scores: Scores) -> Tensor:
        if scores.softcap is None:
            calls = [(path.spans, self._mask(path, scores.window, q_BHLE)) for path in self._paths]
            mixed_BHLE: Tensor = _PathAttention.apply(q_BHLE, k_BKLE, v_BKLE, calls, scores.scale)
            return mixed_BHLE
        parts = []
        for path in self._paths:
            start, stop = path.queries
            mask = _path_mask(path.num_queries, path.num_keys, scores.window, q_BHLE)
            keys, values = _join(k_BKLE, path.spans), _join(v_BKLE, path.spans)
            parts.append(_softcapped(q_BHLE[:, :, start:stop], keys, values, mask, scores.scale, scores.softcap))
        return torch.cat(parts, dim=2)

    def _mask(self, path: Path, window: int | None, like: Tensor) -> Tensor | None:
        """None: plain causal."""
        reach = window if window is not None and window < path.num_keys else None
        if not path.before and reach is None:
            return None
        shape = (path.num_queries, path.num_keys, reach)
        if shape not in self._masks:
            self._masks[shape] = _path_mask(*shape, like)
        return self._masks[shape]


_Call = tuple[tuple[Span, ...], Tensor | None]
"""The spans of a path, its queries' the last, and its mask."""


class _PathAttention(torch.autograd.Function):
    """The CPU's attention kernel on each path, forward and backward, into and out of views of the whole batch.

    Written out, since autograd would fill a gradient of the whole batch for each slice, and copy grouped keys for each
    query head.
    """

    @staticmethod
    def forward(ctx: Any, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, calls: list[_Call], scale: float) -> Tensor:
        q, k, v = _grouped(q_BHLE, k_BKLE), k_BKLE[0].unsqueeze(1), v_BKLE[0].unsqueeze(1)
        out = torch.empty_like(q_BHLE.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        mixed = _grouped(out, k_BKLE)
        sums: list[Tensor] = []
        for spans, mask in calls:
            start, stop = spans[-1]
            queries, keys, values = q[:, :, start:stop], _keys(k, spans, q), _keys(v, spans, q)
            part, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, 0.0, mask is None, attn_mask=mask, scale=scale
            )
            mixed[:, :, start:stop] = part
            sums.append(logsumexp)
        ctx.save_for_backward(q_BHLE, k_BKLE, v_BKLE, out, *sums)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLE, k_BKLE, v_BKLE, out, *sums = ctx.saved_tensors
        q, k, v = _grouped(q_BHLE, k_BKLE), k_BKLE[0].unsqueeze(1), v_BKLE[0].unsqueeze(1)
        d_out, mixed = _grouped(gradients[0], k_BKLE), _grouped(out, k_BKLE)
        d_q, d_k, d_v = (torch.zeros_like(x.transpose(1, 2)).transpose(1, 2) for x in (q_BHLE, k_BKLE, v_BKLE))
        d_queries = _grouped(d_q, k_BKLE)
        for (spans, mask), logsumexp in zip(ctx.calls, sums, strict=True):
            start, stop = spans[-1]
            queries, keys, values = q[:, :, start:stop], _keys(k, spans, q), _keys(v, spans, q)
            d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_out[:, :, start:stop],
                queries,
                keys,
                values,
                mixed[:, :, start:stop],
                logsumexp,
                0.0,
                mask is None,
                attn_mask=mask,
                scale=ctx.scale,
            )
            d_queries[:, :, start:stop] = d_query
            for whole, part in ((d_k[0], d_key.sum(1)), (d_v[0], d_value.sum(1))):
                at = 0
                for begin, end in spans:
                    whole[:, begin:end] += part[:, at : at + end - begin]
                    at += end - begin
        return d_q, d_k, d_v, None, None


def _grouped(x_BHLE: Tensor, k_BKLE: Tensor) -> Tensor:
    """Query heads [K, H/K, L, E] beside the key-value head that they share; B = 1."""
    return x_BHLE[0].unflatten(0, (k_BKLE.shape[1], -1))


def _keys(k_K1LE: Tensor, spans: tuple[Span, ...], q: Tensor) -> Tensor:
    """The path's keys or values, seen once for each query head that shares them."""
    return _join(k_K1LE, spans).expand(-1, q.shape[1], -1, -1)


def _join(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """What is at these positions of the third dimension."""
    if len(spans) == 1 or (len(spans) == 2 and spans[0][1] == spans[1][0]):
        return x[:, :, spans[0][0] : spans[-1][1]]
    return torch.cat([x[:, :, begin:end] for begin, end in spans], dim=2)


def _path_mask(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """Scores' addend [queries, keys]: the queries are the last of the keys, and see those at or before them."""
    distance = torch.arange(keys - queries, keys, device=like.device)[:, None] - torch.arange(keys, device=like.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(queries, keys, device=like.device, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


def _softcapped(q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention with capped scores, which no fused kernel on CPU has."""
    shared = q_BHLE.shape[1] // k_BKLE.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k_BKLE, v_BKLE))
    scores = softcap * torch.tanh((q_BHLE @ k.mT) * (scale / softcap)) + mask
    return scores.softmax(-1) @ v


class TreeBlocks:
    """Rows of trees in FlexAttention on CUDA, which skips blocks without a visible score."""

    def __init__(self, visible_until_BL: Tensor, positions_BL: Tensor):
        """visible_until_BL: int32, the row index at which a token stops being visible."""
        self._visible_until_BL, self._positions_BL = visible_until_BL, positions_BL
        self._masks: dict[int | None, BlockMask] = {}

    def attend(self, q_BHLE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, scores: Scores) -> Tensor:
        if scores.window not in self._masks:
            self._masks[scores.window] = self._block_mask(scores.window)
        return _flex_attention()(
            q_BHLE,
            k_BKLE,
            v_BKLE,
            score_mod=_capped(scores.softcap) if scores.softcap else None,
            block_mask=self._masks[scores.window],
            scale=scores.scale,
            enable_gqa=True,
        )

    def _block_mask(self, window: int | None) -> BlockMask:
        visible_until_BL, positions_BL = self._visible_until_BL, self._positions_BL
        rows, length = visible_until_BL.shape

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < visible_until_BL[b, k])

        reach = window or length

        def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return sees(b, h, q, k) & (positions_BL[b, q] - positions_BL[b, k] < reach)

        chosen = sees if window is None else near
        return create_block_mask(chosen, rows, None, length, length, device=visible_until_BL.device)


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """The same function for the same cap: another one would be compiled again."""

    def cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled: in eager mode it would materialise every score. Lazy: torch.compile imports for 2 s.

    Each number of rows and length of a row is a kernel of its own. Past torch's default of 8 it would quietly give up
    compiling; the stages of one run together need more.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled
