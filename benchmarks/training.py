"""Training speed of every stage: tokens/s, and where the time goes.

    python -m benchmarks.training [recipes/returns.yaml] [--device cuda] [--seconds 8]

Each stage trains an untrained network on its own records, in its own shapes, for a few seconds. RL rewards at random,
since the verifier would accept nothing: all groups give a gradient, and their answers run to the limit. Checkpoints
and MLflow's writes come four times and twice as often as in a pipeline, so that they fall into the time measured.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.table import Row, percent, show
from benchmarks.workload import Workload, arguments, open_workload
from twinloop.domains.domain import Domain, Verdict
from twinloop.registry.tracking import Execution, Mlruns, Tracker
from twinloop.tasks.context import Report
from twinloop.tasks.recipe import TrainStage
from twinloop.training.loop import StepReport, TrainResult, run_training
from twinloop.training.optim import build_optimizer
from twinloop.training.settings import PackedSettings, RolloutSettings, TrainSettings
from twinloop.training.stream import Batches, Step

WARM_STEPS = 3
SECONDS = 8.0
CHECKPOINT_EVERY_S = 5.0
FLUSH_EVERY_S = 5.0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each stage")
    options = parser.parse_args()
    with open_workload(options) as workload:
        show(measure_all(workload, options.seconds))


def measure_all(workload: Workload, seconds: float) -> Iterator[Row]:
    for stage in workload.recipe.train:
        rows, _ = stage_rows(workload, stage, seconds)
        yield from rows
    yield from muon_rows(workload)


def stage_rows(workload: Workload, stage: TrainStage, seconds: float) -> tuple[list[Row], float]:
    """Rows of one stage, and its tokens/s."""
    measured, tracked = measure(workload, stage, seconds)
    parts, total = measured.seconds, measured.seconds.total
    setting = f"{measured.steps} steps of {shape(stage.settings)}"
    often = f"one every {CHECKPOINT_EVERY_S:g} s, and the last"
    data = "rollouts and verdicts" if isinstance(stage.settings, RolloutSettings) else "collating rows"
    logging = percent(parts.report / total) if tracked else "not measured: mlflow is missing"
    rows = [
        Row(f"training, {stage.name}", setting, f"{measured.tokens_per_s:,.0f}", "tokens/s"),
        Row(
            "· optimizer step",
            stage.settings.optimizer,
            percent(parts.optimizer / total),
            "% of the time",
        ),
        Row("· data", data, percent(parts.data / total), "% of the time"),
        Row("· logging", f"MLflow on SQLite, written every {FLUSH_EVERY_S:g} s", logging, "% of the time"),
        Row("· checkpoints", often, percent(parts.checkpoint / total), "% of the time"),
    ]
    return rows, measured.tokens_per_s


def shape(settings: TrainSettings) -> str:
    """What a step holds, in words."""
    if isinstance(settings, PackedSettings):
        return f"{settings.batch_size} rows of {settings.seq_len}"
    if isinstance(settings, RolloutSettings):
        return f"{settings.prompts_per_step} groups of {settings.group_size}"
    return "its own kind"


def measure(workload: Workload, stage: TrainStage, seconds: float) -> tuple[TrainResult, bool]:
    """About `seconds` of the stage, after a few steps that warm up. Whether MLflow was there to be written to."""
    network = workload.new_network()
    objective, batches = workload.build(stage, network, domain=PaidByChance(workload.domain))
    settings, device, ended = stage.settings, workload.runtime.device, [time.perf_counter()]

    def on_warm_step(step: StepReport) -> None:
        ended.append(time.perf_counter())

    warm_up = First(batches, WARM_STEPS)
    run_training(network, objective, warm_up, settings, checkpoint_dir=None, on_step=on_warm_step, device=device)
    steps = max(2, round(seconds / (ended[-1] - ended[-2])))
    with TemporaryDirectory() as folder, log_of(Path(folder), stage) as on_step:
        result = run_training(
            network,
            objective,
            First(batches, steps),
            settings,
            checkpoint_dir=Path(folder) / "checkpoints",
            checkpoint_every_s=CHECKPOINT_EVERY_S,
            on_step=on_step,
            device=device,
        )
        return result, on_step is not None


@dataclass
class First:
    """The next steps of a stream, as a stream of its own."""

    batches: Batches
    total_steps: int

    def next(self) -> Step:
        return self.batches.next()

    def state(self) -> dict[str, Any]:
        return self.batches.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.batches.restore(state)


class PaidByChance(Domain):
    """Reads facts as the real domain does, and rewards half of all answers, the same ones each time."""

    def __init__(self, real: Domain):
        self.read_facts = real.read_facts  # type: ignore[method-assign]

    def verify(self, output: str, facts: Any) -> Verdict:
        return Verdict.of({"chance": zlib.crc32(output.encode()) % 2 == 1}, output=output)


class Unwatched:
    """A Progress that shows nothing."""

    def started(self, stage: str) -> None: ...

    def stepped(self, stage: str, done: float, total: float, metrics: Mapping[str, float]) -> None: ...

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None: ...


@contextmanager
def log_of(folder: Path, stage: TrainStage) -> Iterator[Callable[[StepReport], None] | None]:
    """A stage's log as its task keeps it; None where MLflow is missing."""
    try:
        import mlflow  # noqa: F401
    except ModuleNotFoundError:
        yield None
        return
    execution = Execution(recipe="benchmark", stage=stage.name, key=stage.name, settings={})
    with Tracker(Mlruns(folder / "mlruns"), execution, flush_every_s=FLUSH_EVERY_S) as tracker:
        yield Report(stage.name, Unwatched(), tracker).trained(stage.method.shown)


def muon_rows(workload: Workload) -> list[Row]:
    """One optimizer step on the network's matrices: torch.optim.Muon with AdamW beside it, and ours."""
    model = workload.new_network().to(workload.runtime.device)
    ours = build_optimizer(model, TrainSettings(learning_rate=1e-4))
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = torch.optim.Muon(hidden, lr=1e-4, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-4, fused=True)

    def theirs() -> None:
        muon.step()
        adamw.step()

    def best_ms(step: Callable[[], None]) -> float:
        times = []
        for _ in range(15):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
            _wait(workload)
            start = time.perf_counter()
            step()
            _wait(workload)
            times.append(time.perf_counter() - start)
        return 1e3 * min(times)

    their_ms, our_ms = best_ms(theirs), best_ms(lambda: ours.step(1e-4))
    return [
        Row("optimizer step", "torch.optim.Muon and AdamW, best of 15", f"{their_ms:.1f}", "ms"),
        Row("optimizer step", "ours, best of 15", f"{our_ms:.1f}", "ms"),
        Row("· ratio", "", f"{their_ms / our_ms:.1f}", "times torch.optim"),
    ]


def _wait(workload: Workload) -> None:
    if workload.runtime.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
