"""Which held-out preferences a reward model is measured on where there are more than it is to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twinloop.tasks.measure import held_out_pairs
from twinloop.training.forms import is_held_out


def pair(prompt: int, answer: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"{prompt}"}], "chosen": f"{answer}", "rejected": "no"}


def test_they_are_whole_prompts_in_an_order_that_no_files_order_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [pair(prompt, answer) for prompt in range(600) for answer in range(3)]

    def chosen(some: list[dict[str, Any]]) -> list[int]:
        monkeypatch.setattr("twinloop.records.validated.read_records", lambda *_: some)
        return [int(each["prompt"][0]["content"]) for each in held_out_pairs(Path("data"), 40)]

    found = chosen(records)
    assert len(found) == 39
    assert {found.count(prompt) for prompt in found} == {3}
    assert chosen(records[::-1]) == found
    assert max(found) > 300, "not the first of the file"
    assert all(is_held_out(pair(prompt, 0)) for prompt in found)
