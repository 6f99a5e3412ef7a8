"""What every test needs before the libraries are imported: no telemetry, no network; and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from chromium import CHROMIUM, chromium

from twinloop.common.telemetry import disable_telemetry

if TYPE_CHECKING:
    from playwright.sync_api import Browser

disable_telemetry()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: Debian's package `chromium`")
    with chromium() as found:
        yield found
