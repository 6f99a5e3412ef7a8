"""What counts as text: something that can be seen; and the one Unicode form in which texts are compared."""

from __future__ import annotations

import re
from typing import Literal

_INVISIBLE = (
    *((0x0, 0x20), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x1680, 0x1680)),
    *((0x17B4, 0x17B5), (0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800)),
    *((0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB)),
    *((0x13430, 0x1343F), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
)
"""Code points, both ends included: white space, control and format characters, what Unicode 16 says to leave out of a
display (Default_Ignorable_Code_Point), and the empty Braille pattern. Marks that enclose Arabic numbers are seen."""

VISIBLE = f"[^{''.join(f'{chr(first)}-{chr(last)}' for first, last in _INVISIBLE)}]"
"""A character that can be seen, as a regular expression for `re` and for polars alike."""

FORM: Literal["NFC"] = "NFC"
"""The Unicode form in which texts are compared: é is one character, or e with an accent behind it."""

_VISIBLE = re.compile(VISIBLE)


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen."""
    return _VISIBLE.search(text) is None
