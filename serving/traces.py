"""What was answered, and from what: one JSON line a decision, written beside the request and never in its way."""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import queue
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from twinloop.common.errors import UserError
from twinloop.common.files import write_all

TRACE_ID = re.compile(r"[0-9a-f]{32}")

QUEUED_TRACES = 1024
RECENT_TRACES = 256
"""Traces kept in memory too, so that one can be read in the moment that its answer arrives."""

FILE_BYTES = 16 * 2**20
FILES = 8
"""A folder keeps this many files of about this size, the newest ones, of each process that writes, and as many of all
that have ended."""
BLOCK_BYTES = 64 * 2**10


class TraceStore:
    """Traces in the folder `path`, one set of files a process, so that several servers may share it.

    `record` never waits and never raises: a trace that finds the queue full, or a disk that takes no more, is counted
    in `dropped`. Raises UserError where the folder cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, file_bytes: int = FILE_BYTES, files: int = FILES):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be made ({error.strerror}); see to its disk and permissions"
            ) from None
        self.dropped = 0
        self._file_bytes = file_bytes
        self._files = files
        self._queue: queue.Queue[tuple[str, str] | None] = queue.Queue(QUEUED_TRACES)
        self._recent: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._writer = threading.Thread(target=self._write, name="traces", daemon=True)
        self._writer.start()

    def record(self, trace_id: str, trace: BaseModel) -> None:
        """Keep a trace. Returns at once; the line is on its way to the disk."""
        try:
            line = trace.model_dump_json()
        except ValueError:  # text that is not valid Unicode, from a caller that has not come over HTTP
            with self._lock:
                self.dropped += 1
            return
        with self._lock:
            self._recent[trace_id] = line
            if len(self._recent) > RECENT_TRACES:
                self._recent.popitem(last=False)
            try:
                if self._closed:
                    raise queue.Full
                self._queue.put_nowait((trace_id, line))
            except queue.Full:
                self.dropped += 1

    def get(self, trace_id: str) -> dict[str, Any] | None:
        """The trace of that id, or None where it was never kept or is too old."""
        if TRACE_ID.fullmatch(trace_id) is None:
            return None
        with self._lock:
            line = self._recent.get(trace_id)
        if line is not None:
            return dict(json.loads(line))
        start = f'{{"trace_id":"{trace_id}"'.encode()
        for file in reversed(self._all_files()):
            try:
                with open(file, "rb") as lines:
                    for found in lines:
                        if found.startswith(start) and found.endswith(b"\n"):
                            return dict(json.loads(found))
            except FileNotFoundError:  # another process has just removed it
                continue
            except ValueError:  # a line that was torn, and then written on, by an earlier version
                continue
        return None

    def newest(self) -> Iterator[dict[str, Any]]:
        """Every trace that is kept, also by other processes, the newest first; lines that are torn are left out.

        Read as it is iterated, so that the first ones cost little.
        """
        with self._lock:
            recent = [*self._recent.values()]
        sources = [map(_parsed, reversed(recent)), *(map(_parsed, _backwards(file)) for file in self._all_files())]
        whole = [(trace for trace in source if trace is not None) for source in sources]
        seen: set[str] = set()
        # Each source is in order by itself, within the moment that two answers took to get into the queue.
        for trace in heapq.merge(*whole, key=lambda trace: trace["time"], reverse=True):
            if trace["trace_id"] not in seen:  # what is recent is in a file too
                seen.add(trace["trace_id"])
                yield trace

    def close(self) -> None:
        """Write what is queued and stop. Later traces are counted as dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.put(None)
        self._writer.join()

    def _all_files(self) -> list[Path]:
        return sorted(self.path.glob("traces-*.jsonl"))

    def _write(self) -> None:
        descriptor: int | None = None
        length = 0  # of the file's whole lines
        while (item := self._queue.get()) is not None:
            line = item[1].encode() + b"\n"
            try:
                if descriptor is not None and self._is_used_up(descriptor, length, len(line)):
                    old, descriptor = descriptor, None
                    os.close(old)
                if descriptor is None:
                    descriptor, length = self._next_file(), 0
                _append(descriptor, length, line)
                length += len(line)
            except OSError:
                with self._lock:
                    self.dropped += 1
        if descriptor is not None:
            os.close(descriptor)

    def _is_used_up(self, descriptor: int, length: int, more: int) -> bool:
        """Whether a file is full, ends in a torn line, or was deleted by another process as too old."""
        status = os.fstat(descriptor)
        return length + more > self._file_bytes or status.st_size != length or status.st_nlink == 0

    def _next_file(self) -> int:
        """Open a new file and delete those that are too old."""
        for old in self._too_old():
            old.unlink(missing_ok=True)
        name = f"traces-{time.time_ns():020d}-{os.getpid()}.jsonl"
        # Customers' words are in a trace: only the server's own user may read it.
        descriptor = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with suppress(OSError):  # a disk without locks: then only the number of files protects this one
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def _too_old(self) -> list[Path]:
        """This process's files beyond the limit, and those of processes that have ended beyond theirs. A file that is
        being written is never one: the number of a process may also be that of another, in another container."""
        by_process: dict[str, list[Path]] = {}
        for file in self._all_files():
            by_process.setdefault(file.stem.rpartition("-")[2], []).append(file)
        own = by_process.pop(str(os.getpid()), [])
        ended = sorted(file for files in by_process.values() if not _is_written(files[-1]) for file in files)
        too_old = own[: -(self._files - 1) or None] + ended[: -self._files]
        return [file for file in too_old if not _is_written(file)]


def _is_written(file: Path) -> bool:
    """Whether a store has it open, in any process; the system frees the lock of one that dies."""
    try:
        with open(file, "rb") as lines:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # deleted meanwhile, or on a disk without locks
        return False
    return False


def _parsed(line: str | bytes) -> dict[str, Any] | None:
    """A trace; None for a line that is none."""
    try:
        trace = json.loads(line)
    except ValueError:
        return None
    known = isinstance(trace, dict) and isinstance(trace.get("trace_id"), str) and isinstance(trace.get("time"), str)
    return trace if known else None


def _backwards(file: Path) -> Iterator[bytes]:
    """The lines of a file, the last one first; none of a file that is deleted meanwhile."""
    with suppress(OSError), open(file, "rb") as lines:
        place = lines.seek(0, os.SEEK_END)
        rest = b""
        while place:
            step = min(place, BLOCK_BYTES)
            place -= step
            lines.seek(place)
            rest, *whole = (lines.read(step) + rest).split(b"\n")
            yield from reversed(whole)
        yield rest


def _append(descriptor: int, length: int, line: bytes) -> None:
    """Write a line whole, or cut the file back to the `length` that it had. Raises OSError."""
    try:
        write_all(descriptor, line)
    except OSError:
        with suppress(OSError):  # then the file is longer than its whole lines, and the next trace begins another
            os.ftruncate(descriptor, length)
        raise
