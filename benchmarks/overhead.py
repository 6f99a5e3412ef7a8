"""What orchestration, tracking and hashing cost a stage: pretraining through Prefect, MLflow and the artifact store.

    python -m benchmarks.overhead [recipes/returns.yaml] [--device cuda] [--seconds 60]

The real task on real data, in a project of its own in a temporary folder, on an embedded Prefect server. What happens
once a run (the server, imports, tables of both databases) is reported separately: it is no cost of a stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.table import Row, percent, promise, show
from benchmarks.training import Unwatched, stage_rows
from benchmarks.workload import Workload, arguments, open_workload
from twinloop.domains.loader import load_domain
from twinloop.flows.environment import prepare_environment, quiet_prefect
from twinloop.flows.server import embedded_server, wait_until_ready
from twinloop.records.dataset import DataVersion
from twinloop.registry.tracking import CodeVersion, Tracker
from twinloop.tasks.context import Context

SECONDS = 15.0
MINUTE_S = 60.0
MOST = 0.05
"""Of a stage of a minute or more, as the project promises."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=MINUTE_S, help="that the stage should take")
    options = parser.parse_args()
    with open_workload(options) as workload:
        _, tokens_per_s = stage_rows(workload, workload.recipe.train[0], 5.0)
        show(overhead_rows(workload, tokens_per_s, options.seconds))


@dataclass
class Clock:
    """Seconds by name, over all the calls that were watched."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def watching(self, **methods: tuple[Any, str]) -> Iterator[None]:
        """name=(owner, attribute): what is added to the name's seconds."""
        with ExitStack() as patches:
            for name, (owner, attribute) in methods.items():
                patches.enter_context(patch.object(owner, attribute, self._timed(name, getattr(owner, attribute))))
            yield

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        self.seconds[name] = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed


@dataclass(frozen=True)
class Stage:
    """Seconds of one stage. whole: of the Prefect task; loop: forward, backward, optimizer, batches; tracking_rate:
    what of tracking grows with the stage's length. once: before the first stage could begin."""

    whole: float
    loop: float
    orchestration: float
    tracking: float
    tracking_in_loop: float
    store: float
    steps: int
    once: float

    @property
    def overhead(self) -> float:
        return self.orchestration + self.tracking + self.store

    def share_of(self, length_s: float) -> float:
        """The overhead's share of such a stage of this length: its start and end cost the same, its steps grow."""
        grown = self.tracking_in_loop * (length_s / self.whole - 1)
        return (self.overhead + grown) / length_s


def overhead_rows(workload: Workload, tokens_per_s: float, seconds: float) -> list[Row]:
    """Rows of a pretraining stage of about `seconds`, its length chosen by the speed measured before."""
    # Looked for, not imported: Prefect reads the address of its server when it is.
    if missing := next((name for name in ("prefect", "mlflow", "pandera") if find_spec(name) is None), None):
        return [Row("orchestration, tracking, hashing", "", f"not measured: {missing} is missing", "")]
    found = run_stage(workload, int(tokens_per_s * seconds))
    minute = found.share_of(max(MINUTE_S, found.whole))
    least = f"a stage of {max(MINUTE_S, found.whole):.0f} s" + (", scaled" if found.whole < MINUTE_S else "")
    rest = found.whole - found.loop - found.overhead
    return [
        Row("a whole stage", f"pretrain in Prefect, {found.steps} steps", f"{found.whole:.2f}", "s"),
        Row("· forward, backward, optimizer, batches", "", f"{found.loop:.2f}", "s"),
        Row("· reading, tokenising, packing, checkpoints, saving", "", f"{rest:.2f}", "s"),
        Row("· orchestration", "Prefect's task", f"{found.orchestration:.3f}", "s"),
        Row("· tracking", "MLflow on SQLite", f"{found.tracking:.3f}", "s"),
        Row("· hashing and storing", "artifact, its key and its code", f"{found.store:.3f}", "s"),
        Row("· the three together", "this stage", percent(found.overhead / found.whole), "% of the time"),
        Row("· the three together", least, percent(minute), "% of the time", promise("under 5", minute < MOST)),
        Row("before the first stage", "Prefect's server and flow, imports, databases", f"{found.once:.1f}", "s a run"),
    ]


def run_stage(workload: Workload, tokens: int) -> Stage:
    """Validation, tokenizer and pretraining as one flow, the last of them measured."""
    first = workload.recipe.train[0]
    stage = replace(first, settings=first.settings.model_copy(update={"tokens": tokens}))
    with TemporaryDirectory(prefix="twinloop-overhead-") as folder:
        project = Path(folder)
        prepare_environment(project)
        quiet_prefect()
        began = time.perf_counter()
        with embedded_server(project):
            from prefect import flow

            from twinloop.tasks.base import new_base
            from twinloop.tasks.prepare import validate_data
            from twinloop.tasks.tokenize import tokenize
            from twinloop.tasks.train import train

            clock = Clock()
            context = Context(
                project=project,
                recipe="benchmark",
                recipe_path=None,
                loaded_domain=load_domain(workload.recipe.domain, project),
                dataset_digest="benchmark",
                progress=Unwatched(),
                code=CodeVersion(None),
                checkpoint_every_s=workload.recipe.checkpoint_every_s,
            )

            @flow(name="overhead", validate_parameters=False)
            def measured() -> Stage:
                once = time.perf_counter() - began + _open_mlflow(context)
                raw = DataVersion(md5="benchmark", path=workload.data)
                recipe = workload.recipe
                data = validate_data(context, recipe.validate_, needed=recipe.record_types, data=raw)
                tokenizer = tokenize(context, workload.base.vocab_size, records=[stage.method.records], data=data)
                base = new_base(context, workload.base, seed=workload.runtime.seed, tokenizer=tokenizer)
                with clock.watching(
                    run=(Context, "run"),
                    opening=(Tracker, "__enter__"),
                    logging=(Tracker, "log"),
                    closing=(Tracker, "__exit__"),
                ):
                    started = time.perf_counter()
                    model = train(context, stage, workload.runtime, data=data, model=base, audit=None)
                    whole = time.perf_counter() - started
                metrics, spent = model.metrics, clock.seconds
                return Stage(
                    whole=whole,
                    loop=sum(metrics[f"seconds_{part}"] for part in ("data", "compute", "optimizer")),
                    orchestration=whole - spent["run"],
                    tracking=spent["opening"] + spent["logging"] + spent["closing"],
                    tracking_in_loop=spent["logging"],
                    store=spent["run"] - model.manifest.seconds,
                    steps=metrics["steps"],
                    once=once,
                )

            wait_until_ready(project)
            return measured()


def _open_mlflow(context: Context) -> float:
    """Seconds until MLflow's client is there, its tables made."""
    began = time.perf_counter()
    assert context.mlruns.client
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
