"""A network that labels words, with its held-out cases, for what compares the forms of a release."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from contexts import silent_context
from labelling import ANSWERS, LABELS, LIMITS, prompt, stored

from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context
from twinloop.training.weights import get_weights, new_decoder


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    project = tmp_path_factory.mktemp("project")
    (project / "labels.py").write_text(LABELS.read_text())
    (project / "gate.yaml").write_text(json.dumps(LIMITS))
    return silent_context(project, "labels", domain="./labels.py")


@pytest.fixture(scope="module")
def data(context: Context) -> Artifact:
    rows = [
        {"case_id": text, "kind": "held_out", "pair_id": None, "prompt": prompt(text), "facts": label,
         "expected": {"answer": label}}
        for text, label in ANSWERS.items()
    ]  # fmt: skip
    return stored(context, "data", {}, lambda out: pl.DataFrame(rows).write_parquet(out / "cases.parquet"))


@pytest.fixture(scope="module")
def model(context: Context) -> Artifact:
    """A network that has learned the answers, and to stop after them."""

    def write(out: Path) -> None:
        tokenizer = train_tokenizer([*ANSWERS, *ANSWERS.values(), "label it"], 280)
        config = DecoderConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        )  # fmt: skip
        network = new_decoder(config, seed=0)
        rows, targets = torch.zeros(5, 32, dtype=torch.int64), torch.full((5, 32), -100)
        for row, target, (text, label) in zip(rows, targets, ANSWERS.items(), strict=True):
            asked, answer = tokenizer.encode_prompt(prompt(text)), tokenizer.encode_answer(label)
            row[: len(asked) + len(answer)] = torch.tensor([*asked, *answer])
            target[len(asked) - 1 : len(asked) + len(answer) - 1] = torch.tensor(answer)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
        for _ in range(25):
            scored = network.logits(network.hidden(rows, torch.arange(32).expand(5, -1)))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(scored.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
        save_model(out, config, get_weights(network), tokenizer)

    return stored(context, "sft", {}, write)
