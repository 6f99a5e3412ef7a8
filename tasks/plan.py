"""What a recipe takes, before it runs: memory by part, arithmetic, and a rough time on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from twinloop.models.config import DecoderConfig, Precision
from twinloop.models.decoder import Decoder
from twinloop.models.memory import ServingMemory, TrainingMemory, flops_per_token, serving_memory, training_memory
from twinloop.tasks.recipe import Recipe, TrainStage
from twinloop.training.runtime import Runtime

BYTES_A_TOKEN = 3.0
"""Of the records of the default domain, under its own tokenizer."""
TRAINED_SHARE = 0.5
"""The other half of a record is facts for the verifier."""
PROBE_FLOPS = 2e10
"""Of one probe of the machine: a second on a slow core."""
PROBES = 5
LEFT_FOR_STEP = 0.8
"""Share of the time that is left for forward and backward; the rest is the optimizer and the data."""


@dataclass(frozen=True)
class StagePlan:
    """tokens and flops of the whole stage; None where the data is not there to be counted."""

    name: str
    memory: TrainingMemory
    tokens: int | None
    flops: float | None
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    config: DecoderConfig
    stages: list[StagePlan]
    serving: dict[Precision, ServingMemory]
    flops_per_second: float


def make_plan(recipe: Recipe, project: Path, runtime: Runtime) -> Plan:
    """Plan with the vocabulary as large as the recipe allows."""
    config, max_length = recipe.base.decoder_config(recipe.base.vocab_size), recipe.base.max_length
    rate = _flops_per_second(config, runtime, *recipe.train[0].settings.shape(max_length))
    stages = []
    for stage in recipe.train:
        rows, seq_len = stage.settings.shape(max_length)
        memory = training_memory(
            config,
            micro_batch_tokens=rows * seq_len,
            seq_len=seq_len,
            optimizer=stage.settings.optimizer,
            device=runtime.device,
            reference=stage.settings.has_reference(),
        )
        tokens = stage.settings.planned_tokens(_data_tokens(stage, project))
        flops = None if tokens is None else tokens * flops_per_token(config, context=seq_len / 2, training=True)
        stages.append(StagePlan(stage.name, memory, tokens, flops, None if flops is None else flops / rate))
    serving = {
        precision: serving_memory(config, precision=precision, slots=recipe.evaluate.slots, max_length=max_length)
        for precision in recipe.export.on(runtime.device)
    }
    return Plan(config, stages, serving, rate)


def _data_tokens(stage: TrainStage, project: Path) -> int | None:
    """About how many tokens of a stage's records are trained on; None where the file is not there."""
    files = [project / "data" / f"{stage.method.records}.{ending}" for ending in ("jsonl", "parquet")]
    size = next((file.stat().st_size for file in files if file.exists()), None)
    return None if size is None else round(size * TRAINED_SHARE / BYTES_A_TOKEN)


def _flops_per_second(config: DecoderConfig, runtime: Runtime, rows: int, seq_len: int) -> float:
    """What a training step of one such layer reaches on this machine, now."""
    one_layer = config.model_copy(update={"num_hidden_layers": 1})
    per_token = flops_per_token(one_layer, context=seq_len / 2, training=True)
    rows = max(1, min(rows, round(PROBE_FLOPS / per_token) // seq_len))
    torch.set_num_threads(runtime.threads)
    network = Decoder(one_layer).to(runtime.device)
    tokens_BL = torch.randint(config.vocab_size, (rows, seq_len), device=runtime.device)
    positions_BL = torch.arange(seq_len, device=runtime.device).expand(rows, -1)

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast(runtime.device, torch.bfloat16, enabled=runtime.device == "cuda"):
            logits_BLV = network.logits(network.hidden(tokens_BL, positions_BL)).float()
        F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten()).backward()
        if runtime.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step()  # the first one allocates
    seconds = min(step() for _ in range(PROBES))
    return LEFT_FOR_STEP * per_token * rows * seq_len / seconds
