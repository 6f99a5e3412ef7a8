"""Every number that the project promises something about, in one table.

    python -m benchmarks [recipes/returns.yaml] [--device cuda] [--full]

--full measures longer: half a minute of each stage's training, and a stage of a minute through Prefect. What the
machine lacks (Prefect or MLflow on a bare device) is named as not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.decode import rollout_rows, step_rows
from benchmarks.overhead import overhead_rows
from benchmarks.table import Row, show
from benchmarks.training import muon_rows, stage_rows
from benchmarks.workload import Workload, arguments, heading_of, open_workload
from twinloop.common.errors import UserError

FULL_SECONDS, FULL_STAGE_SECONDS = 30.0, 62.0
SECONDS, STAGE_SECONDS = 8.0, 15.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="measure longer")
    options = parser.parse_args()
    try:
        with open_workload(options) as workload:
            print(f"{heading_of(workload)}\n", flush=True)
            show(measure(workload, full=options.full))
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(workload: Workload, *, full: bool) -> Iterator[Row]:
    seconds, stage_seconds = (FULL_SECONDS, FULL_STAGE_SECONDS) if full else (SECONDS, STAGE_SECONDS)
    announce("decode steps")
    yield from step_rows(workload, workload.recipe.export.on(workload.runtime.device)[0])
    announce("rollouts")
    yield from rollout_rows(workload)
    tokens_per_s: dict[str, float] = {}
    for stage in workload.recipe.train:
        announce(f"training, {stage.name}")
        rows, tokens_per_s[stage.name] = stage_rows(workload, stage, seconds)
        yield from rows
    yield from muon_rows(workload)
    announce("a stage through Prefect, MLflow and the artifact store")
    yield from overhead_rows(workload, tokens_per_s[workload.recipe.train[0].name], stage_seconds)


def announce(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
