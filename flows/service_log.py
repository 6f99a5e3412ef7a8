"""Writes what a service prints into its log, in files of a bounded size: NAME.log, and before it NAME.log.1 and so on.

    service | python -m flows.service_log state/services/NAME.log

It ends when nobody can write to it any more, so that a service's last words are kept however that ended.
"""

from __future__ import annotations

import logging
import signal
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

FILE_BYTES = 10 * 2**20
FILES_BEFORE = 2
LINE_BYTES = 64 * 2**10
"""A longer line is written in parts."""


def write_log(path: Path) -> None:
    """Copy standard input to `path` until it ends. What the disk does not take is lost, and the service goes on."""
    logging.raiseExceptions = False
    handler = RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=FILES_BEFORE, encoding="utf-8", delay=True)
    while line := sys.stdin.buffer.readline(LINE_BYTES):
        text = line.decode(errors="replace").rstrip("\n")
        handler.handle(logging.LogRecord("service", logging.INFO, "", 0, text, None, None))
    handler.close()


if __name__ == "__main__":
    for asked_to_end in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(asked_to_end, signal.SIG_IGN)
    write_log(Path(sys.argv[1]))
