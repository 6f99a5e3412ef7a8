"""One GPU job at a time: of this project by a lock file, and among all machines of a Prefect server by its limit `gpu`.

A shared server's runs hold both, so that they and a run on its own embedded server, or a gate without Prefect, wait for
each other where they share a machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from twinloop.common.errors import UserError
from twinloop.flows.server import has_shared_server
from twinloop.flows.services import GPU_SLOT
from twinloop.training.runtime import Runtime

log = logging.getLogger(__name__)


@contextmanager
def gpu_slot(project: Path, runtime: Runtime, *, shared: bool | None = None) -> Iterator[None]:
    """Hold the GPU, once nobody else does; nothing where the run needs none. shared: whether a Prefect server that is
    not this run's own counts the jobs; None: as Prefect's settings have it."""
    with ExitStack() as held:
        if runtime.device == "cuda":
            if has_shared_server() if shared is None else shared:
                _enter_limit(held)
            _enter_lock(held, project)
        yield


def _enter_limit(held: ExitStack) -> None:
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    try:
        held.enter_context(concurrency(GPU_SLOT, occupy=1, strict=True))
    except ConcurrencySlotAcquisitionError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Prefect's global limit {GPU_SLOT}: {reason}; make it with `prefect gcl create {GPU_SLOT} --limit 1`"
        ) from None


def _enter_lock(held: ExitStack, project: Path) -> None:
    (project / "state").mkdir(exist_ok=True)
    lock = FileLock(project / "state" / "gpu.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("another job of this project uses the GPU (%s); waiting for it", lock.lock_file)
        lock.acquire()
    held.callback(lock.release)
