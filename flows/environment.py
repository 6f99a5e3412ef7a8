"""Settings that libraries read from the environment when they are imported. Set here, before any of them is.

Everything that a run makes lies in the project.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

# Threads of one operation wait for each other by spinning. With a neighbour on a core they spin for whole time slices:
# on two cores with one busy, training fell from 10,000 to 650 tokens/s, and with a short spin to 8,000. A quiet machine
# shows no difference.
GNU_OPENMP_SPIN_COUNT = "10000"


def prepare_environment(project: Path | None = None) -> None:
    """Short spins; with a project, Prefect's home in it. What the user has set stays."""
    os.environ.setdefault("GOMP_SPINCOUNT", GNU_OPENMP_SPIN_COUNT)
    if project is None:
        return
    os.environ.setdefault("PREFECT_HOME", str(project / "state" / "prefect"))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder only
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # MLflow without git on the machine


def quiet_prefect() -> None:
    """Prefect's own lines are for a worker's log; on a terminal the display shows the same. Before it is imported."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")  # of its background services
    logging.getLogger("EventsWorker").setLevel(logging.CRITICAL)  # it counts what it still has to send
