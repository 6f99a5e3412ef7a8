"""What several tests of whole commands share: services that take a minute to start are started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running_services import Services


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """`make up` in a project that has no champion yet."""
    ours = Services(tmp_path_factory.mktemp("services"))
    up = ours.say("up")
    try:
        assert up.returncode == 0, up.stderr
        assert "api: not started, no model is promoted yet" in up.stderr
        yield ours
    finally:
        ours.say("down")
