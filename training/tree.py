"""The packed token tree: the one batch type of every objective.

A tree is a root segment and, below it, segments that continue their parent: a document (root only), an SFT example
(root only, scored in its answer), a DPO pair (a prompt, two children), a GRPO group (a prompt, its answers). A token
sees its own segment up to itself, and its ancestors. Positions go on from the parent's end, so a prompt is computed
once, whatever hangs below it. Trees never see each other.

A batch is the trees one behind the other, as one row without padding; on CUDA, rows of one length. Segments are in
preorder, so a subtree is one contiguous run. Visibility then needs one number a token, where its segment's subtree
ends: query q sees key k when k <= q < visible_until[k].

Shapes: letters as in `models.shapes`. S counts the scored sequences: segments with at least one target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twinloop.common.errors import UserError
from twinloop.models.attention import AttentionPlan, Path, Span, TreeBlocks, TreePaths
from twinloop.models.decoder import Decoder
from twinloop.models.products import ROW_MULTIPLE
from twinloop.training.row_values import row_values

ROOT = -1


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens.

    tokens: int32 [n]. weights: float32 [n], the weight of each token as a target, 0 where it is not scored.
    parent: index of the segment in its tree that it continues; ROOT for the first.
    advantage, old_logprobs, reference_logprobs, old_values, returns: float32, one a scored token: how much better it
    was than expected; by the sampler, by the frozen reference; what a critic expected before it, and is to expect.
    teacher: one a scored token, as `training.distillation` lays them out.
    label: the number of the right one, of a text that is classified.
    """

    tokens: np.ndarray
    weights: np.ndarray
    parent: int = ROOT
    advantage: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None
    old_values: np.ndarray | None = None
    returns: np.ndarray | None = None
    teacher: np.ndarray | None = None
    label: int = 0

    @property
    def num_scored(self) -> int:
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments in preorder. divisible: a plain document, which packing may cut into row-sized pieces."""

    segments: tuple[Segment, ...]
    divisible: bool = False

    def __post_init__(self) -> None:
        path: list[int] = []
        for index, segment in enumerate(self.segments):
            while path and path[-1] != segment.parent:
                path.pop()
            assert bool(path) == (index > 0), "segments must be in preorder below one root"
            assert len(segment.tokens) == len(segment.weights) > 0, "a segment needs tokens, and a weight for each"
            path.append(index)
        assert self.segments[0].weights[0] == 0, "nothing precedes a root's first token, so it cannot be scored"

    @property
    def length(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def num_scored(self) -> int:
        return sum(segment.num_scored for segment in self.segments)

    @property
    def num_sequences(self) -> int:
        """Segments with a scored token: the sequences of a batch."""
        return sum(segment.num_scored > 0 for segment in self.segments)


def _segment(tokens: Sequence[int] | np.ndarray, *, scored: bool, parent: int = ROOT) -> Segment:
    array = np.asarray(tokens, dtype=np.int32)
    return Segment(array, np.full(len(array), float(scored), dtype=np.float32), parent)


def document(tokens: Sequence[int] | np.ndarray) -> Tree:
    """A text whose every token but the first is scored. It may be longer than a row: packing cuts it."""
    segment = _segment(tokens, scored=True)
    segment.weights[0] = 0.0
    return Tree((segment,), divisible=True)


def example(prompt: Sequence[int], answer: Sequence[int]) -> Tree:
    """An SFT example: only the answer, its stop token included, is scored."""
    _need(prompt=prompt, answer=answer)
    return conversation([*prompt, *answer], [range(len(prompt), len(prompt) + len(answer))])


def conversation(tokens: Sequence[int], answers: Sequence[range]) -> Tree:
    """A conversation of which only the answers, their stop tokens included, are scored. answers: where they are."""
    segment = _segment(tokens, scored=False)
    for answer in answers:
        segment.weights[answer.start : answer.stop] = 1.0
    return Tree((segment,))


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Tree:
    """A preference: the prompt once, the chosen and the rejected answer (stop tokens included) below it."""
    _need(prompt=prompt, chosen=chosen, rejected=rejected)
    children = tuple(_segment(answer, scored=True, parent=0) for answer in (chosen, rejected))
    return Tree((_segment(prompt, scored=False), *children))


def group(
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    advantages: Sequence[float | Sequence[float]] = (),
    old_logprobs: Sequence[Sequence[float]] = (),
    old_values: Sequence[Sequence[float]] = (),
    returns: Sequence[Sequence[float]] = (),
) -> Tree:
    """A prompt once, its sampled completions (stop tokens included) below it.

    advantages: for each completion, one of all its tokens, or one a token. old_logprobs: for each completion, the
    log-probability of each of its tokens under the distribution sampled from. old_values, returns: one a token as well,
    where there is a critic.
    """
    _need(prompt=prompt, **{f"completion {i}": tokens for i, tokens in enumerate(completions)})
    children = [_segment(tokens, scored=True, parent=0) for tokens in completions]
    rated = {"advantage": advantages, "old_logprobs": old_logprobs, "old_values": old_values, "returns": returns}
    for name, values in rated.items():
        if len(values):
            each = zip(completions, values, strict=True)
            parts = [np.broadcast_to(np.asarray(value, dtype=np.float32), len(tokens)) for tokens, value in each]
            changes: list[dict[str, Any]] = [{name: part} for part in parts]
            children = [replace(child, **change) for child, change in zip(children, changes, strict=True)]
    return Tree((_segment(prompt, scored=False), *children))


def labelled(tokens: Sequence[int], label: int = 0) -> Tree:
    """A text that a head scores at its last token; nothing else of it counts."""
    _need(text=tokens[1:])
    segment = replace(_segment(tokens, scored=False), label=label)
    segment.weights[-1] = 1.0
    return Tree((segment,))


def _need(**parts: Sequence[int]) -> None:
    for name, tokens in parts.items():
        if not len(tokens):
            raise UserError(f"training example: its {name} holds no tokens; drop the record or fill it in")


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """Trees one behind the other in a single row, and what the loss needs of them.

    tokens_BL, positions_BL: int64. visible_until_BL: int32, the index in its row at which a token stops being visible.
    predict_from_N: int64, flat index into B*L of the hidden state that predicts the target. target_N: int64.
    weight_N: float32. length_S: int64, scored tokens of each sequence; those of a sequence are adjacent.
    last_S: int64, flat index into B*L of its last token, which a head scores. label_S: int64.
    advantage_N, old_logprobs_N, reference_logprobs_N, old_value_N, return_N: float32, or None where no tree of the
    batch has them.
    teacher_ids_NK: int64, the K likeliest tokens by a teacher. teacher_logprobs_NK: float32, theirs, and in one more
    column that of all others together where there are others. None where no tree of the batch has them.
    paths: one a segment, and one of padding. row_lengths: tokens of each row that was packed, at most seq_len.
    total_weight: the sum of weight_N.
    temperature: what logits are divided by before they become log-probabilities. vocab_size: of how many ids, the first
    ones; None: all rows of the network. Both are the sampler's, for rollouts.
    """

    tokens_BL: Tensor
    positions_BL: Tensor
    visible_until_BL: Tensor
    predict_from_N: Tensor
    target_N: Tensor
    weight_N: Tensor
    length_S: Tensor
    last_S: Tensor
    label_S: Tensor
    advantage_N: Tensor | None
    old_logprobs_N: Tensor | None
    reference_logprobs_N: Tensor | None
    old_value_N: Tensor | None
    return_N: Tensor | None
    paths: tuple[Path, ...]
    row_lengths: tuple[int, ...]
    seq_len: int
    total_weight: float
    temperature: float = 1.0
    vocab_size: int | None = None
    teacher_ids_NK: Tensor | None = None
    teacher_logprobs_NK: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.row_lengths)

    @property
    def num_sequences(self) -> int:
        return len(self.length_S)

    def sum_by_sequence(self, values_N: Tensor) -> Tensor:
        """Sum [S] of the values [N] of each sequence's scored tokens. Deterministic on every device."""
        return torch.segment_reduce(values_N, "sum", lengths=self.length_S)

    @property
    def reference_S(self) -> Tensor:
        """Log-probability [S] of each sequence under the frozen reference."""
        assert self.reference_logprobs_N is not None, "attach the reference's log-probabilities before training"
        return self.sum_by_sequence(self.reference_logprobs_N)

    def to(self, device: torch.device) -> TreeBatch:
        """The batch on a device; on CUDA in rows."""
        if device.type == "cpu":
            return self
        laid_out = self.in_rows()
        moved: dict[str, Any] = {field.name: getattr(laid_out, field.name) for field in fields(laid_out)}
        moved |= {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return TreeBatch(**moved)

    def in_rows(self) -> TreeBatch:
        """Laid out in rows of seq_len, a power of two of them: few kernels are compiled.

        Padding sees itself alone: a token that sees nothing would make NaN in softmax.
        """
        rows, length = 1 << (len(self.row_lengths) - 1).bit_length(), self.seq_len
        first_token = np.cumsum([0, *self.row_lengths[:-1]])
        before = torch.from_numpy(np.repeat(np.arange(len(first_token)) * length - first_token, self.row_lengths))
        place = torch.arange(self.num_tokens) + before  # of each token among the rows' positions

        def in_rows(values_BL: Tensor, padding: Tensor) -> Tensor:
            return padding.repeat(rows).index_copy_(0, place, values_BL[0, : self.num_tokens]).view(rows, length)

        empty, order = torch.zeros(length, dtype=torch.int64), torch.arange(length, dtype=torch.int32)
        until = self.visible_until_BL[:, : self.num_tokens] + (before - place // length * length).int()
        return replace(
            self,
            tokens_BL=in_rows(self.tokens_BL, empty),
            positions_BL=in_rows(self.positions_BL, empty),
            visible_until_BL=in_rows(until, order + 1),
            predict_from_N=place[self.predict_from_N],
            last_S=place[self.last_S],
        )


def collate(
    rows: Sequence[Sequence[Tree]], seq_len: int, *, temperature: float = 1.0, vocab_size: int | None = None
) -> TreeBatch:
    """Lay the trees of all rows one behind the other. No row may hold more than seq_len tokens."""
    row_lengths = tuple(sum(tree.length for tree in row) for row in rows)
    assert max(row_lengths) <= seq_len, "a row holds more tokens than its length"
    length = -(-sum(row_lengths) // ROW_MULTIPLE) * ROW_MULTIPLE  # at most 15 tokens of padding, as a tree of their own
    tokens_L = np.zeros(length, dtype=np.int64)
    positions_L = np.zeros_like(tokens_L)
    visible_until_L = np.full(length, length, dtype=np.int32)
    order_L = np.arange(seq_len)
    predict_from: list[np.ndarray] = []
    scored_segments: list[tuple[Segment, np.ndarray]] = []
    last: list[int] = []
    paths: list[Path] = []
    cursor = 0
    for tree in (tree for row in rows for tree in row):
        tree_paths, ends = _layout(tree, cursor)
        for segment, path, end in zip(tree.segments, tree_paths, ends, strict=True):
            start, stop = path.queries
            position = path.num_keys - path.num_queries
            tokens_L[start:stop] = segment.tokens
            positions_L[start:stop] = order_L[position : position + stop - start]
            visible_until_L[start:stop] = end
            scored = np.flatnonzero(segment.weights)
            if len(scored):
                before = scored + (start - 1)
                if scored[0] == 0:  # the parent's last hidden state predicts a child's first token
                    before[0] = path.before[-1][1] - 1
                predict_from.append(before)
                scored_segments.append((segment, scored))
                last.append(stop - 1)
        paths += tree_paths
        cursor += tree.length
    if cursor < length:
        paths.append(Path((cursor, length)))
    lengths = np.array([len(scored) for _, scored in scored_segments], dtype=np.int64)
    weight_N = _joined([segment.weights[scored] for segment, scored in scored_segments], np.float32)
    segments = [segment for segment, _ in scored_segments]
    taught = [segment.teacher for segment in segments]
    return TreeBatch(
        tokens_BL=torch.from_numpy(tokens_L)[None],
        positions_BL=torch.from_numpy(positions_L)[None],
        visible_until_BL=torch.from_numpy(visible_until_L)[None],
        predict_from_N=torch.from_numpy(_joined(predict_from, np.int64)),
        target_N=torch.from_numpy(_joined([s.tokens[scored] for s, scored in scored_segments], np.int64)),
        weight_N=torch.from_numpy(weight_N),
        length_S=torch.from_numpy(lengths),
        last_S=torch.tensor(last, dtype=torch.int64),
        label_S=torch.tensor([segment.label for segment in segments], dtype=torch.int64),
        advantage_N=_given([segment.advantage for segment in segments]),
        old_logprobs_N=_given([segment.old_logprobs for segment in segments]),
        reference_logprobs_N=_given([segment.reference_logprobs for segment in segments]),
        old_value_N=_given([segment.old_values for segment in segments]),
        return_N=_given([segment.returns for segment in segments]),
        teacher_ids_NK=_given(taught, "ids", np.int64),
        teacher_logprobs_NK=_given(taught, "logprobs"),
        paths=tuple(paths),
        row_lengths=row_lengths,
        seq_len=seq_len,
        total_weight=float(weight_N.sum(dtype=np.float64)),
        temperature=temperature,
        vocab_size=vocab_size,
    )


def _layout(tree: Tree, cursor: int) -> tuple[list[Path], list[int]]:
    """For each segment: the path that it ends, and where its subtree ends."""
    paths: list[Path] = []
    ends: list[int] = []
    for segment in tree.segments:
        before = () if segment.parent == ROOT else _with(paths[segment.parent].before, paths[segment.parent].queries)
        paths.append(Path((cursor, cursor + len(segment.tokens)), before))
        cursor += len(segment.tokens)
        ends.append(cursor)
    for index in range(len(ends) - 1, 0, -1):
        parent = tree.segments[index].parent
        ends[parent] = max(ends[parent], ends[index])
    return paths, ends


def _with(before: tuple[Span, ...], next_span: Span) -> tuple[Span, ...]:
    """The spans and one more; adjacent ones are one."""
    if before and before[-1][1] == next_span[0]:
        return (*before[:-1], (before[-1][0], next_span[1]))
    return (*before, next_span)


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(parts, dtype=dtype) if parts else np.zeros(0, dtype=dtype)


def _given(
    parts: Sequence[np.ndarray | None], field: str | None = None, dtype: type[np.generic] = np.float32
) -> Tensor | None:
    """The parts as one, or a field of theirs, when every scored segment has one."""
    given = [part[field] if field else part for part in parts if part is not None]
    return torch.from_numpy(_joined(given, dtype)) if given and len(given) == len(parts) else None


def attention_plan(batch: TreeBatch) -> AttentionPlan:
    """Who sees whom, as the batch's device computes it."""
    if batch.visible_until_BL.device.type == "cuda":
        return TreeBlocks(batch.visible_until_BL, batch.positions_BL)
    return TreePaths(batch.paths)


def sequence_scores(model: Decoder, batch: TreeBatch) -> Tensor:
    """What the network's head gives to each sequence at its last token, float32 [S, labels], differentiable."""
    return model.logits(_hidden(model, batch, batch.last_S))


def scored_logprobs(model: Decoder, batch: TreeBatch, *, chunk: int | None = None) -> Tensor:
    """log p(target) [N] of every scored token, float32, differentiable. chunk: as `row_values`."""
    return target_logprobs(model, scored_hidden(model, batch), batch, chunk=chunk)


def scored_hidden(model: Decoder, batch: TreeBatch) -> Tensor:
    """The final hidden state [N, D] that predicts each scored token."""
    return _hidden(model, batch, batch.predict_from_N)


def _hidden(model: Decoder, batch: TreeBatch, places: Tensor) -> Tensor:
    """Final hidden states [places, D]. places: flat indices into B*L."""
    hidden_BLD = model.hidden(batch.tokens_BL, batch.positions_BL, attention_plan(batch))
    # index_select, not indexing: its backward adds a branching point's gradients in a fixed order
    return hidden_BLD.flatten(0, 1).index_select(0, places)


def target_logprobs(model: Decoder, hidden_ND: Tensor, batch: TreeBatch, *, chunk: int | None = None) -> Tensor:
    """log p(target) [N] by the hidden states of `scored_hidden`, float32, differentiable. chunk: as `row_values`."""

    def logprobs(hidden: Tensor, target: Tensor) -> Tensor:
        logits = model.logits(hidden)[:, : batch.vocab_size].float()
        if batch.temperature != 1.0:
            logits = logits / batch.temperature
        return -F.cross_entropy(logits, target, reduction="none")

    return row_values(model, logprobs, hidden_ND, batch.target_N, chunk=chunk)
