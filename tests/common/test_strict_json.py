"""JSON from a file or a model: one value, read in one way, or a reason."""

from __future__ import annotations

import math
from typing import Any

import pytest

from twinloop.common.strict_json import MAX_DEPTH, NotJSONError, parse_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (' {"a": [1, 2.5, true, null, "b"]}\n', {"a": [1, 2.5, True, None, "b"]}),
        ('[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ("1e999", math.inf),
        ("1" * 5000, math.inf),
        ('{"a": "[[[{{{\\"[["}', {"a": '[[[{{{"[['}),
        ("[" * 3 + "]" * 3, [[[]]]),
        ('["' + "[" * 1000 + '"]', ["[" * 1000]),
        ("[" + ", ".join(["[]"] * 1000) + "]", [[]] * 1000),
    ],
)
def test_a_value_is_read(text: str, value: Any) -> None:
    assert parse_json(text) == value


def test_the_deepest_value_that_is_read_has_max_depth_levels() -> None:
    value, levels = parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH), 1
    while value:
        (value,), levels = value, levels + 1
    assert levels == MAX_DEPTH


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expecting value at column 1"),
        ("{} {}", "extra data at column 4"),
        ('{"a": 1, "a": 1}', "a key appears twice in one object"),
        ('{"b": [{"a": 1, "\\u0061": 2}]}', "a key appears twice in one object"),
        ("[NaN]", "NaN is no JSON value"),
        ("-Infinity", "-Infinity is no JSON value"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deep (more than 128 levels)"),
        ("[" * 100_000, "nested too deep (more than 128 levels)"),
        ('{"a":' * 100_000, "nested too deep (more than 128 levels)"),
        ('["\\"", ' * 100_000, "nested too deep (more than 128 levels)"),
    ],
)
def test_what_is_not_one_value_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(NotJSONError) as error:
        parse_json(text)
    assert str(error.value) == reason
