"""The training loop, one for all methods. It knows a model, an objective and a stream of steps, and no method.

It may be killed at any instruction: a run that goes on from its last checkpoint ends with the same weights, bit for
bit, as one that was never stopped, wherever the checkpoints fell. That holds for a given device and thread count.
Left out: data parallelism and asynchronous checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from twinloop.common.errors import UserError
from twinloop.models.decoder import Decoder
from twinloop.models.products import products_in_use
from twinloop.training import checkpoint
from twinloop.training.adapters import adapter_form
from twinloop.training.checkpoint import Checkpoint
from twinloop.training.heap import Holes, keep_free_memory, return_free_memory
from twinloop.training.objectives import Objective, join_metrics
from twinloop.training.optim import Optimizer, build_optimizer, learning_rate_at
from twinloop.training.reproducible import reproducible
from twinloop.training.settings import TrainSettings
from twinloop.training.stream import Batches, Step


@dataclass
class Seconds:
    """Wall time by part. compute: forward and backward. report: the caller's on_step."""

    data: float = 0.0
    compute: float = 0.0
    optimizer: float = 0.0
    checkpoint: float = 0.0
    report: float = 0.0

    @property
    def total(self) -> float:
        return self.data + self.compute + self.optimizer + self.checkpoint + self.report

    def add(self, other: Seconds) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class StepReport:
    """One finished step. step counts from 1. tokens: not padding. grad_norm: before clipping."""

    step: int
    total_steps: int
    loss: float
    tokens: int
    tokens_per_s: float
    learning_rate: float
    grad_norm: float
    metrics: dict[str, float]
    seconds: Seconds
    last: bool = False
    """The stream ends with this step, though it had more."""


@dataclass
class TrainResult:
    """A whole run, over all the processes that it took. initial_loss: of the first step; loss, metrics: of the last."""

    steps: int = 0
    tokens: int = 0
    initial_loss: float = math.nan
    loss: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)
    ended_early: bool = False
    resumed_from_step: int | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds.total if self.seconds.total else 0.0

    def summary(self) -> dict[str, float]:
        """What the table and the tracker show: losses, metrics of the last step, and the seconds by part."""
        seconds = {f"seconds_{name}": round(value, 3) for name, value in vars(self.seconds).items()}
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "initial_loss": self.initial_loss,
            "loss": self.loss,
            **self.metrics,
            **seconds,
        }


def run_training(
    model: Decoder,
    objective: Objective,
    batches: Batches,
    settings: TrainSettings,
    *,
    checkpoint_dir: Path | None,
    checkpoint_every_s: float = 30.0,
    on_step: Callable[[StepReport], None] | None = None,
    device: str = "cpu",
) -> TrainResult:
    """Train `model` in place until the stream ends: its adapter alone, where it has one. An objective that is a
    module trains with it. By the products in use on CPU, in bf16 autocast on CUDA.

    Goes on from the newest good checkpoint in checkpoint_dir, and leaves one there at the end, so a second call
    returns at once. None keeps no checkpoints. Raises UserError if the loss or a gradient is not finite, or if the
    checkpoint belongs to another network or plan.
    """
    target = torch.device(device)
    model.to(target).train()
    if isinstance(objective, nn.Module):
        objective.to(target)
    if target.type == "cpu":
        keep_free_memory()
    # With an adapter the network is large, and activations are most of what it takes: no gradients of its own.
    holes = Holes() if target.type == "cpu" and adapter_form(model) is not None else None
    optimizer = build_optimizer(model, settings, objective)
    result = TrainResult()
    if checkpoint_dir is not None and (found := checkpoint.latest(checkpoint_dir)) is not None:
        result = _resume(found, optimizer, batches)
    saved_at = time.perf_counter()
    saved_step = result.steps if result.resumed_from_step is not None else -1
    with reproducible(target):
        while result.steps < batches.total_steps and not result.ended_early:
            report = _train_step(model, objective, optimizer, batches, result.steps, target, holes)
            if not result.steps:
                result.initial_loss = report.loss
            result.steps, result.loss, result.metrics = report.step, report.loss, report.metrics
            result.ended_early = report.last
            result.tokens += report.tokens
            result.seconds.add(report.seconds)
            start = time.perf_counter()
            if on_step is not None:
                on_step(report)
            reported = time.perf_counter()
            result.seconds.report += reported - start
            if checkpoint_dir is not None and reported - saved_at >= checkpoint_every_s:
                _save(checkpoint_dir, optimizer, batches, result)
                saved_step, saved_at = result.steps, time.perf_counter()
                result.seconds.checkpoint += saved_at - reported
        if checkpoint_dir is not None and saved_step != result.steps:
            started = time.perf_counter()
            _save(checkpoint_dir, optimizer, batches, result)
            result.seconds.checkpoint += time.perf_counter() - started
    model.eval()
    return_free_memory()
    return result


def _train_step(
    model: Decoder,
    objective: Objective,
    optimizer: Optimizer,
    batches: Batches,
    done: int,
    device: torch.device,
    holes: Holes | None,
) -> StepReport:
    started = time.perf_counter()
    step = batches.next()
    prepared = time.perf_counter()
    loss, metrics = _accumulate(model, objective, step, device, holes)
    if not math.isfinite(loss):
        raise UserError(_diverged(f"the loss is {loss}", done + 1, optimizer.settings))
    learning_rate = learning_rate_at(done, batches.total_steps, optimizer.settings)
    computed = time.perf_counter()
    grad_norm = 0.0
    if any(batch.total_weight > 0 for batch in step.micro_batches):
        grad_norm = float(optimizer.clip_gradients())
        if not math.isfinite(grad_norm):
            raise UserError(_diverged(f"the gradient's norm is {grad_norm}", done + 1, optimizer.settings))
        optimizer.step(learning_rate)
    stepped = time.perf_counter()
    tokens = sum(batch.num_tokens for batch in step.micro_batches)
    return StepReport(
        step=done + 1,
        total_steps=batches.total_steps,
        loss=loss,
        tokens=tokens,
        tokens_per_s=tokens / (stepped - started),
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        metrics=step.metrics | metrics,
        seconds=Seconds(data=prepared - started, compute=computed - prepared, optimizer=stepped - computed),
        last=step.last,
    )


def _accumulate(
    model: Decoder, objective: Objective, step: Step, device: torch.device, holes: Holes | None = None
) -> tuple[float, dict[str, float]]:
    """Gradients of the step's loss, micro-batch by micro-batch; returns the loss and the metrics of the whole.

    Each micro-batch counts by what its loss is a mean over (tokens, pairs), so the cut changes nothing.
    """
    sizes = [objective.normaliser(batch) for batch in step.micro_batches]
    names: list[str] = []
    scalars: list[Tensor] = []
    shares = [size / sum(sizes) for size in sizes if size > 0]
    scored = [batch for batch, size in zip(step.micro_batches, sizes, strict=True) if size > 0]
    for share, batch in zip(shares, scored, strict=True):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, metrics = objective.loss(model, batch)
        (loss * share).backward()
        names = ["loss", *metrics]
        scalars += [loss.detach(), *metrics.values()]
        if holes is not None:
            del loss
            holes.close()
    values = torch.stack(scalars).tolist() if scalars else []  # the one wait for the device
    width = len(names)
    parts = [(share, dict(zip(names, values[i * width :], strict=False))) for i, share in enumerate(shares)]
    joined = join_metrics(parts)
    return joined.pop("loss", 0.0), joined


def _diverged(what: str, step: int, settings: TrainSettings) -> str:
    return f"training: {what} at step {step}; lower learning_rate (now {settings.learning_rate}) or raise warmup_ratio"


def _save(directory: Path, optimizer: Optimizer, batches: Batches, result: TrainResult) -> None:
    tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in optimizer.trained.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.tensors().items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    progress = asdict(result)
    progress.pop("resumed_from_step")
    state = {
        "batches": batches.state(),
        "total_steps": batches.total_steps,
        "products": asdict(products_in_use()),
        "progress": progress,
    }
    checkpoint.save(directory, Checkpoint(result.steps, tensors, state))


def _resume(found: Checkpoint, optimizer: Optimizer, batches: Batches) -> TrainResult:
    weights = {name.removeprefix("model/"): t for name, t in found.tensors.items() if name.startswith("model/")}
    expected = {name: tuple(tensor.shape) for name, tensor in optimizer.trained.items()}
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != expected:
        raise UserError("training checkpoint: it holds another network; remove the working directory and run again")
    if found.state["total_steps"] != batches.total_steps:
        raise UserError(
            f"training checkpoint: it was made for {found.state['total_steps']} steps, now there are "
            f"{batches.total_steps}; remove the working directory and run again"
        )
    if found.state["products"] != asdict(products_in_use()):
        raise UserError(
            f"training checkpoint: its matrices were multiplied as {found.state['products']}, now as "
            f"{asdict(products_in_use())}; remove the working directory and run again"
        )
    with torch.no_grad():
        for name, parameter in optimizer.trained.items():
            parameter.copy_(weights[name])
    prefix = "optimizer/"
    optimizer.restore({n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)})
    torch.set_rng_state(found.tensors["rng/cpu"])
    if "rng/cuda" in found.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(found.tensors["rng/cuda"])
    batches.restore(found.state["batches"])
    progress = found.state["progress"]
    seconds = Seconds(**progress.pop("seconds"))
    return TrainResult(**progress, seconds=seconds, resumed_from_step=found.step)
