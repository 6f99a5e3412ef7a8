"""What a recipe takes, before it runs: memory by part, arithmetic, and a rough time on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from models.config import DecoderConfig
from models.memory import ServingMemory, TrainingMemory, flops_per_token, serving_memory, training_memory
from tasks.recipe import Packed, Precision, Recipe

BYTES_A_TOKEN = 3.0
"""Of the records of the default domain, under its own tokenizer."""
TRAINED_SHARE = 0.5
"""The other half of a record is facts for the verifier."""
REACHED = 0.3
"""Share of the rate of a bare matrix product that a training step of a small network reaches on a CPU."""
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


def make_plan(recipe: Recipe, project: Path, *, device: Literal["cpu", "cuda"]) -> Plan:
    """Plan with the vocabulary as large as the recipe allows."""
    config = recipe.model.decoder_config(recipe.tokenizer.vocab_size)
    rate = _flops_per_second(recipe, config)
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
            device=device,
            reference=name == "rlvr" and recipe.rlvr.kl > 0,
        )
        tokens = _tokens(recipe, project, name)
        flops = None if tokens is None else tokens * flops_per_token(config, context=row_length / 2, training=True)
        stages.append(StagePlan(name, memory, tokens, flops, None if flops is None else flops / rate))
    serving = {
        precision: serving_memory(
            config, precision=precision, slots=recipe.evaluate.slots, max_length=recipe.model.max_length
        )
        for precision in recipe.export.on(device)
    }
    return Plan(config, stages, serving, rate)


def _tokens(recipe: Recipe, project: Path, stage: str) -> int | None:
    if stage == "pretrain":
        return recipe.pretrain.tokens
    if stage == "rlvr":
        sampled = recipe.rlvr.steps * recipe.rlvr.prompts_per_step * recipe.rlvr.group_size * recipe.rlvr.max_new_tokens
        return round(sampled * (1 + ROLLOUT_COST))
    file = project / "data" / {"sft": "sft_examples.jsonl", "dpo": "preference_pairs.jsonl"}[stage]
    if not file.exists():
        return None
    epochs = recipe.sft.epochs if stage == "sft" else recipe.dpo.epochs
    return round(file.stat().st_size * TRAINED_SHARE / BYTES_A_TOKEN) * epochs


def _flops_per_second(recipe: Recipe, config: DecoderConfig) -> float:
    """What a product of the MLP's shape reaches here, now, less what a training step loses around it."""
    rows = recipe.pretrain.rows_per_step * recipe.pretrain.row_length
    left = np.ones((rows, config.hidden_size), np.float32)
    right = np.ones((config.hidden_size, config.intermediate_size), np.float32)
    left @ right
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.3:
        left @ right
        rounds += 1
    seconds = time.perf_counter() - started
    return REACHED * rounds * 2 * rows * config.hidden_size * config.intermediate_size / seconds
