"""A text has something that can be seen."""

from __future__ import annotations

import sys
import unicodedata

import polars as pl
import pytest

from twinloop.common.texts import VISIBLE, is_blank

MARKS_OF_NUMBERS = [*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD]
"""Format characters that are drawn."""


@pytest.mark.parametrize(
    "text", ["", " ", "\u200b", "\ufeff", "\u202e\u2066", "\ufe0f", "\u3000\u00a0", "\u00ad", "\u3164"]
)
def test_what_cannot_be_seen_is_blank(text: str) -> None:
    assert is_blank(text)
    assert not is_blank(f"{text}a")


@pytest.mark.parametrize("text", ["a", "-", "]", "\\", "^", "é", "\u0301", "字", "❤\ufe0f", "\u0600"])
def test_what_can_be_seen_is_not(text: str) -> None:
    assert not is_blank(text)


def test_python_and_polars_see_the_same_and_what_unicode_says() -> None:
    points = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point <= 0xDFFF]
    seen = pl.Series([chr(point) for point in points]).str.contains(VISIBLE).to_list()
    assert seen == [not is_blank(chr(point)) for point in points]
    blank = {point for point, visible in zip(points, seen, strict=True) if not visible}
    unseen = {point for point in points if unicodedata.category(chr(point)) in ("Cc", "Cf", "Zs", "Zl", "Zp")}
    assert unseen - blank == set(MARKS_OF_NUMBERS)
    ignorable = pl.Series([chr(point) for point in points]).str.contains(r"\p{Default_Ignorable_Code_Point}").to_list()
    assert {point for point, ignored in zip(points, ignorable, strict=True) if ignored} <= blank
