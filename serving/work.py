"""Blocking work of requests in threads of its own, given up when the client goes away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from twinloop.serving.generation import GivenUpError

T = TypeVar("T")

MAX_THREADS = 512
"""More than the scheduler's queue and slots together: a request that was accepted never waits for a thread."""


class Workers:
    """Threads that wait for tokens. Short calls, such as /health, keep the framework's own."""

    def __init__(self) -> None:
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """Run `work` in a thread. A cancelled caller does not wait for it."""
        if self._limiter is None:  # made here since it belongs to the running event loop
            self._limiter = anyio.CapacityLimiter(MAX_THREADS)
        return await anyio.to_thread.run_sync(work, *args, abandon_on_cancel=True, limiter=self._limiter)

    async def run_unless_gone(self, request: Request, work: Callable[[], T], cancel: Callable[[], None]) -> T:
        """Run `work` in a thread, and call `cancel` when the client disconnects or this task is cancelled.

        Raises ClientDisconnect where the client did, and else what `work` raises.
        """
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            cancel()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(watch)
                result = await self.run(work)
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            if not gone or not isinstance(errors.exceptions[0], GivenUpError):
                raise errors.exceptions[0] from None
        finally:
            cancel()
        if gone:
            raise ClientDisconnect
        return result
