"""What every stage of training does alike: a network in, the loop, a model directory out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.tasks.context import Report
from twinloop.tasks.recipe import Optimisation
from twinloop.tasks.runtime import Runtime
from twinloop.training.loop import StepReport, TrainSettings, train
from twinloop.training.objectives import Objective
from twinloop.training.stream import Batches
from twinloop.training.weights import get_weights, load_decoder


def open_model(directory: Path, runtime: Runtime) -> tuple[Decoder, ChatTokenizer]:
    """The network and the tokenizer of a model directory; torch uses the run's threads from here on."""
    torch.set_num_threads(runtime.threads)
    return load_decoder(directory), ChatTokenizer.load(directory)


def train_settings(settings: Optimisation, runtime: Runtime, *, checkpoint_every_s: float) -> TrainSettings:
    """What the loop needs of a stage's settings."""
    return TrainSettings(
        learning_rate=settings.learning_rate,
        warmup=settings.warmup,
        decay=settings.decay,
        optimizer=settings.optimizer,
        weight_decay=settings.weight_decay,
        checkpoint_every_s=checkpoint_every_s,
        threads=runtime.threads,
    )


def report_step(report: Report, step: StepReport) -> None:
    """What whoever watches and MLflow get to know of a step."""
    shown = {"loss": step.loss, "tokens_per_s": step.tokens_per_s}
    shown |= {"learning_rate": step.learning_rate, "grad_norm": step.grad_norm}
    report(step.step, step.total_steps, shown | step.metrics)


def learn(
    model: Decoder,
    tokenizer: ChatTokenizer,
    objective: Objective,
    batches: Batches,
    settings: Optimisation,
    runtime: Runtime,
    *,
    out: Path,
    keep: Path,
    report: Report,
    checkpoint_every_s: float,
) -> dict[str, Any]:
    """Train to the end, going on from what `keep` holds, and write the model directory into `out`.

    Returns what the table and MLflow show: steps, tokens, tokens per second, the last step's loss and metrics, and the
    seconds by part.
    """
    result = train(
        model,
        objective,
        batches,
        train_settings(settings, runtime, checkpoint_every_s=checkpoint_every_s),
        checkpoint_dir=keep / "checkpoints",
        on_step=partial(report_step, report),
        device=runtime.device,
    )
    save_model(out, model.config, get_weights(model), tokenizer)
    seconds = {f"seconds_{name}": round(value, 3) for name, value in vars(result.seconds).items()}
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens_per_s,
        "loss": result.loss,
        **result.metrics,
        **seconds,
    }
