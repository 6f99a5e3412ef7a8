"""Which MLflow runs are alive: the process of each holds a lock, which the kernel releases however it dies."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from mlflow.entities import Run

    from twinloop.registry.tracking import Mlruns

HOST = "twinloop.host"
"""Tag of a run: the machine on which its lock is."""


def alive_lock(mlruns: Mlruns, run_id: str) -> FileLock:
    """Held by the process of a run for as long as it lives."""
    return mlruns.lock(f"run-{run_id}")


def seen_alive(mlruns: Mlruns, run_id: str) -> None:
    """Note that the run was alive just now: its end, should its process die."""
    lock_file = Path(alive_lock(mlruns, run_id).lock_file)
    if lock_file.exists():
        os.utime(lock_file)


def release(lock: FileLock) -> None:
    """The run has ended."""
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def mark_killed(mlruns: Mlruns, experiment_id: str) -> list[Run]:
    """End the runs whose process died without a word, as of when they were last seen alive. Latest first."""
    killed = []
    here = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
    for run in mlruns.client.search_runs([experiment_id], here):
        run_id, alive = run.info.run_id, alive_lock(mlruns, run.info.run_id)
        last_seen = Path(alive.lock_file).stat().st_mtime if Path(alive.lock_file).exists() else None
        try:
            alive.acquire(blocking=False)
        except Timeout:
            continue  # another process is at it
        try:
            if mlruns.client.get_run(run_id).info.status == "RUNNING":  # not ended since the search
                mlruns.client.set_terminated(run_id, "KILLED", int(last_seen * 1000) if last_seen else None)
                killed.append(run)
        finally:
            release(alive)
    return killed
