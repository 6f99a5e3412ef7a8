"""Memory is given back when holes have grown, and not after every micro-batch."""

from __future__ import annotations

import pytest

from twinloop.training import heap
from twinloop.training.heap import Holes

MIB = 1 << 20


def closings(monkeypatch: pytest.MonkeyPatch, held_mib: list[int]) -> list[int]:
    """The micro-batches after which memory was given back. held_mib: after each of them."""
    closed: list[int] = []
    holes = Holes()
    for number, held in enumerate(held_mib):
        monkeypatch.setattr(heap, "resident_bytes", lambda held=held: held * MIB)
        monkeypatch.setattr(heap, "return_free_memory", lambda number=number: closed.append(number))
        holes.close()
    return closed


def test_holes_are_closed_once_a_tenth_is_lost_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert closings(monkeypatch, [1000, 1040, 1090, 1110, 1000, 1090, 1101]) == [3, 6]


def test_what_one_micro_batch_takes_after_they_were_closed_is_no_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows get longer: one try, then it stays."""
    assert closings(monkeypatch, [1000, 1500, 1500, 1520, 1500, 1640]) == [1]
    assert closings(monkeypatch, [1000, 1500, 1500, 1660]) == [1, 3]
