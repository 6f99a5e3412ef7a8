"""Keeps the logs of services at a bounded size: what is in NAME.log moves to NAME.log.1 when it is long, and so on.

A service writes into its log by itself, always at the end, so that nothing of it depends on this process.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

FILE_BYTES = 10 * 2**20
FILES_BEFORE = 2
LOOK_EVERY_S = 10.0


def rotate(log: Path) -> None:
    """Begin the log anew if it is long. A line that is written within the microseconds in which it is cut is lost."""
    if log.stat().st_size <= FILE_BYTES:
        return
    for number in range(FILES_BEFORE, 1, -1):
        if (old := log.with_name(f"{log.name}.{number - 1}")).exists():
            old.replace(log.with_name(f"{log.name}.{number}"))
    with log.open("rb") as source, log.with_name(f"{log.name}.1").open("wb") as copy:
        while True:
            shutil.copyfileobj(source, copy)
            if source.tell() == os.fstat(source.fileno()).st_size:
                os.truncate(log, 0)
                return


def main() -> None:
    folder = Path(sys.argv[1])
    while True:
        for log in folder.glob("*.log"):
            try:
                rotate(log)
            except OSError as error:  # a full disk: the log grows no more either
                print(f"{log}: {error}", flush=True)
        time.sleep(LOOK_EVERY_S)


if __name__ == "__main__":
    main()
