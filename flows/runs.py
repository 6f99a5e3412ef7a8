"""Runs that Prefect holds to be under way though their process is gone: found, and marked as crashed.

A run from the command line holds a lock, which the kernel lets go when its process dies, and carries the lock's name as
a tag. A worker's runs end with the worker: `make up` marks those when it starts one.
"""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas import FlowRun

UNFINISHED = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
TAG = "twinloop-run:"
_TAG = re.compile(rf"{TAG}([0-9a-f]{{32}})")


@contextmanager
def marked_alive(project: Path) -> Iterator[None]:
    """Meanwhile, the flows that this process starts are known to be alive. Imports Prefect."""
    from prefect import tags

    name = uuid.uuid4().hex
    path = _lock_file(project, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        try:
            with tags(f"{TAG}{name}"):
                yield
        finally:
            path.unlink(missing_ok=True)


def crash_dead_runs(project: Path) -> None:
    """Mark the unfinished runs of this project's command line whose process is gone. A run whose lock file is not here
    is another project's: a server may be shared."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(UNFINISHED)):
            locks = [_lock_file(project, match[1]) for tag in run.tags if (match := _TAG.fullmatch(tag))]
            if locks and locks[0].exists() and not _is_held(locks[0]):
                _crash(client, run, "its process is gone")
                locks[0].unlink(missing_ok=True)


def crash_runs_of_pool(pool: str) -> None:
    """Mark every unfinished run of a pool without a live worker as crashed, whatever its last reported state."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter

    of_pool = WorkPoolFilter.model_validate({"name": {"any_": [pool]}})
    with get_client(sync_client=True) as client:
        unfinished = FlowRunFilter.model_validate(UNFINISHED)
        for run in client.read_flow_runs(flow_run_filter=unfinished, work_pool_filter=of_pool):
            _crash(client, run, "its worker is gone")
            print(f"worker: run {run.name} was cut off; it is marked as crashed", file=sys.stderr)


def _crash(client: SyncPrefectClient, run: FlowRun, why: str) -> None:
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Crashed

    of_run = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
    unfinished = TaskRunFilter.model_validate(UNFINISHED)
    for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=unfinished):
        client.set_task_run_state(task.id, Crashed(message=why), force=True)
    client.set_flow_run_state(run.id, Crashed(message=why), force=True)


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path).acquire(blocking=False):
            return False
    except Timeout:
        return True


def _lock_file(project: Path, name: str) -> Path:
    return project / "state" / "runs" / name
