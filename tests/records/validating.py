"""Rows and settings for tests of validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.returns import domain
from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.records.validation import ValidationReport
from twinloop.tasks.recipe import ValidateSettings

COUNT = 80
PARAMS = GeneratorParams(**{name: COUNT for name, field in GeneratorParams.model_fields.items() if field.is_required()})
RECORD_TYPES = domain.record_types()
SPLIT_KEYS: list[str] = ["text", "order_id", "policy_id", "window_and_days"]
LENIENT = ValidateSettings(max_quarantined=0.5, split_keys=SPLIT_KEYS)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def write(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def row(path: Path, number: int = 1) -> dict[str, Any]:
    return json.loads(lines_of(path)[number - 1])


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def refused(check: Callable[..., ValidationReport], split_keys: list[str] = SPLIT_KEYS) -> str:
    with pytest.raises(UserError) as raised:
        check(ValidateSettings(max_quarantined=0.5, split_keys=split_keys))
    assert "\n" not in str(raised.value)
    return str(raised.value)
