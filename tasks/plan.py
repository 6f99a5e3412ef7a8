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
from twinloop.tasks.recipe import Packed, Recipe
from twinloop.tasks.runtime import Runtime

BYTES_A_TOKEN = 3.0
"""Of the records of the default domain, under its own tokenizer."""
TRAINED_SHARE = 0.5
"""The other half of a record is facts for the verifier."""
PROBE_FLOPS = 2e10
"""Of one probe of the machine: a second on a slow core."""
PROBES = 5
LEFT_FOR_STEP = 0.8
"""Share of the time that is left for forward and backward; the rest is the optimizer and the data."""
ROLLOUT_COST = 2 / 3
"""A sampled token costs one forward pass, which is a third of training on it; a group in two is informative."""


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
    config = recipe.model.decoder_config(recipe.tokenizer.vocab_size)
    pretrain = recipe.pretrain
    rate = _flops_per_second(config, runtime, pretrain.row_length, pretrain.batch_tokens)
    stages = []
    for name in ("pretrain", "sft", "dpo", "rlvr"):
        settings = getattr(recipe, name)
        if isinstance(settings, Packed):
            rows = settings.micro_rows or settings.rows_per_step
            micro_batch, row_length = rows * settings.row_length, settings.row_length
        else:
            row_length = recipe.model.max_length
            micro_batch = (settings.micro_rows or settings.prompts_per_step) * row_length
        memory = training_memory(
            config,
            micro_batch_tokens=micro_batch,
            row_length=row_length,
            optimizer=settings.optimizer,
            device=runtime.device,
            reference=name == "rlvr" and recipe.rlvr.kl > 0,
        )
        tokens = _tokens(recipe, project, name)
        flops = None if tokens is None else tokens * flops_per_token(config, context=row_length / 2, training=True)
        stages.append(StagePlan(name, memory, tokens, flops, None if flops is None else flops / rate))
    serving = {
        precision: serving_memory(
            config, precision=precision, slots=recipe.evaluate.slots, max_length=recipe.model.max_length
        )
        for precision in recipe.export.on(runtime.device)
    }
    return Plan(config, stages, serving, rate)


def _tokens(recipe: Recipe, project: Path, stage: str) -> int | None:
    if stage == "pretrain":
        return recipe.pretrain.tokens
    if stage == "rlvr":
        sampled = recipe.rlvr.steps * recipe.rlvr.prompts_per_step * recipe.rlvr.group_size * recipe.rlvr.max_new_tokens
        return round(sampled * (1 + ROLLOUT_COST))
    file = project / "data" / {"sft": "chat.jsonl", "dpo": "preferences.jsonl"}[stage]
    if not file.exists():
        return None
    epochs = recipe.sft.epochs if stage == "sft" else recipe.dpo.epochs
    return round(file.stat().st_size * TRAINED_SHARE / BYTES_A_TOKEN) * epochs


def _flops_per_second(config: DecoderConfig, runtime: Runtime, row_length: int, batch_tokens: int) -> float:
    """What a training step of one such layer reaches on this machine, now."""
    one_layer = config.model_copy(update={"num_hidden_layers": 1})
    per_token = flops_per_token(one_layer, context=row_length / 2, training=True)
    rows = max(1, min(batch_tokens, round(PROBE_FLOPS / per_token)) // row_length)
    torch.set_num_threads(runtime.threads)
    network = Decoder(one_layer).to(runtime.device)
    tokens_BL = torch.randint(config.vocab_size, (rows, row_length), device=runtime.device)
    positions_BL = torch.arange(row_length, device=runtime.device).expand(rows, -1)

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
    return LEFT_FOR_STEP * per_token * rows * row_length / seconds
