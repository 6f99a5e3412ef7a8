"""Trees into rows of a fixed length: longest first, best fit, deterministic, nothing lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twinloop.common.errors import UserError
from twinloop.training.tree import Segment, Tree

Row = tuple[Tree, ...]
ROW_MULTIPLE = {"cpu": 16, "cuda": 128}  # a vector's width, FlexAttention's block


def row_length(longest: int, device: str) -> int:
    """As short as the longest tree allows, of a length that the device likes."""
    multiple = ROW_MULTIPLE[device]
    return -(-longest // multiple) * multiple


@dataclass(frozen=True)
class Packing:
    """rows: the trees of each row. fill: the share of positions that hold a token."""

    rows: list[Row]
    seq_len: int
    fill: float


def cut(trees: Iterable[Tree], seq_len: int) -> list[Tree]:
    """Trees that fit a row: documents that don't are cut into pieces.

    A piece begins with the last token of the piece before it, unscored there, so every token that the document scores
    is scored exactly once. Raises UserError for anything else that is longer than the row: nothing is truncated.
    """
    fitting: list[Tree] = []
    for index, tree in enumerate(trees):
        if tree.length <= seq_len:
            fitting.append(tree)
        elif tree.divisible:
            fitting.extend(_pieces(tree, seq_len))
        else:
            raise UserError(
                f"training example {index}: {tree.length} tokens do not fit a row of {seq_len}; "
                "raise seq_len or shorten the record"
            )
    return fitting


def _pieces(tree: Tree, seq_len: int) -> Iterable[Tree]:
    segment = tree.segments[0]
    for start in range(0, len(segment.tokens) - 1, seq_len - 1):
        weights = segment.weights[start : start + seq_len].copy()
        weights[0] = 0.0
        yield Tree((Segment(segment.tokens[start : start + seq_len], weights),), divisible=True)


def pack(trees: Sequence[Tree], seq_len: int) -> Packing:
    """Each tree, longest first, into the fullest row where it fits. Documents too long are cut before.

    Rows come out ordered by their longest tree: shuffle them before training on them.
    """
    rows: list[list[Tree]] = []
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by free positions
    some_free = 0  # bit f is set where open_rows[f] is not empty: the best fit is the lowest bit that suffices
    used = 0
    for tree in sorted(cut(trees, seq_len), key=lambda tree: -tree.length):
        length = tree.length
        used += length
        roomy = some_free >> length << length
        if roomy:
            free = (roomy & -roomy).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                some_free ^= 1 << free
            rows[row].append(tree)
        else:
            free, row = seq_len, len(rows)
            rows.append([tree])
        left = free - length
        if left:
            open_rows[left].append(row)
            some_free |= 1 << left
    fill = used / (len(rows) * seq_len) if rows else 0.0
    return Packing([tuple(row) for row in rows], seq_len, fill)
