"""A report that cannot be written is a warning, and no failed release."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from twinloop.flows import story


def write(monkeypatch: pytest.MonkeyPatch, gather: Callable[..., Any]) -> object:
    monkeypatch.setattr(story, "gather", gather)
    published = SimpleNamespace(version="returns version 7", promotion=None, error=None)
    outcome: Any = SimpleNamespace(gate=None, published=published, rows=(), failure="gate: BLOCK")
    nothing: Any = SimpleNamespace(run=None, project=None)
    return story.write_story(nothing, nothing, nothing, outcome)


def test_what_fails_in_it_ends_no_lifecycle(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert write(monkeypatch, lambda *_: 1 / 0) is None
    assert caplog.messages == ["the report is not complete: ZeroDivisionError: division by zero"]


def test_a_full_disk_is_reported_as_everywhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(monkeypatch, full)
