"""Blocking work of requests in threads of its own, given up when the client goes away."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from twinloop.serving.decisions import DecisionService
from twinloop.serving.generation import GivenUpError
from twinloop.serving.model_manager import ModelManager
from twinloop.serving.named import is_served

T = TypeVar("T")

MAX_NAMED = 512
"""Requests for versions beside the served model that are submitted at once: others wait without a thread."""


class Workers:
    """Threads that wait for tokens, as many as there are accepted answers: each of these has a place at a scheduler,
    which limits them. Short calls, such as /health, keep the framework's own."""

    def __init__(self) -> None:
        self._limiter: anyio.CapacityLimiter | None = None
        self._loading: anyio.CapacityLimiter | None = None

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """Run `work` in a thread. A cancelled caller does not wait for it."""
        if self._limiter is None:  # made here since it belongs to the running event loop
            self._limiter = anyio.CapacityLimiter(math.inf)
        return await anyio.to_thread.run_sync(work, *args, abandon_on_cancel=True, limiter=self._limiter)

    async def submit(self, manager: ModelManager, work: Callable[[DecisionService], T], name: str | None) -> T:
        """`ModelManager.submit` in a thread, which nobody abandons: what it has begun must be ended by its caller.

        A version beside the served model may have to be read first. Who waits for that has a place in the queue, but
        none of the threads that other requests and probes need.
        """
        if self._loading is None:
            self._loading = anyio.CapacityLimiter(MAX_NAMED)
        limiter = None if is_served(manager.service.model, name) else self._loading
        return await anyio.to_thread.run_sync(manager.submit, work, name, limiter=limiter)

    async def merge(self, iterators: Sequence[Iterator[T]]) -> AsyncIterator[T]:
        """What all of them give, each item as soon as it is there. Raises what the first that fails raises."""
        if len(iterators) == 1:  # most answers are one: no task is made for each of its items
            while (item := await self.run(next, iterators[0], None)) is not None:
                yield item
            return
        waiting = {self._next_of(iterator): iterator for iterator in iterators}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (item := await task) is not None:
                        yield item
                        waiting[self._next_of(waiting[task])] = waiting[task]
                    del waiting[task]
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)  # also those that have failed are looked at

    def _next_of(self, iterator: Iterator[T]) -> asyncio.Task[T | None]:
        return asyncio.ensure_future(self.run(next, iterator, None))

    async def run_unless_gone(self, request: Request, cancel: Callable[[], None], *works: Callable[[], T]) -> list[T]:
        """Run each of `works` in a thread, and call `cancel` when the client disconnects or this task is cancelled.

        Raises ClientDisconnect where the client did, and else what one of the works raises.
        """
        gone = False
        results: dict[int, T] = {}

        async def watch() -> None:
            nonlocal gone
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            cancel()

        try:
            async with anyio.create_task_group() as group:

                async def run(index: int) -> None:
                    results[index] = await self.run(works[index])
                    if len(results) == len(works):
                        group.cancel_scope.cancel()

                group.start_soon(watch)
                for index in range(len(works)):
                    group.start_soon(run, index)
        except BaseExceptionGroup as errors:
            if not gone or not isinstance(errors.exceptions[0], GivenUpError):
                raise errors.exceptions[0] from None
        finally:
            cancel()
        if gone:
            raise ClientDisconnect
        return [results[index] for index in range(len(works))]


async def run_detached(work: Callable[..., T], *args: object) -> T:
    """Run `work` in a thread that nobody has to wait for: neither a cancelled caller, nor the end of the process, which
    waits for the threads of `Workers`."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(result: Callable[[], None]) -> None:
        if not outcome.done():  # else the caller has left
            result()

    def run() -> None:
        try:
            done = work(*args)
            result = partial(outcome.set_result, done)
        except BaseException as error:
            result = partial(outcome.set_exception, error)
        with suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=run, name="detached", daemon=True).start()
    return await outcome
