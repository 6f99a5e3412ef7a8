"""The base of a recipe with a new network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from silent import Silent

from twinloop.models.directory import load_tensors
from twinloop.records.dataset import DataVersion
from twinloop.tasks.base import base_stage
from twinloop.tasks.context import Context
from twinloop.tasks.prepare import validate_stage
from twinloop.tasks.recipe import load_recipe
from twinloop.tasks.tokenize import tokenize_stage

BASE = {"depth": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_length": 64, "vocab_size": 270}
STAGE = {"method": "pretrain", "learning_rate": 0.01, "batch_tokens": 128, "seq_len": 64, "tokens": 1280}


def test_keys_begin_as_queries_where_the_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("corpus", "corpus_heldout"):
        rows = [{"text": f"{name} of the other customer {number}"} for number in range(12)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alike = {}
    for tied in ({"keys_as_queries": True}, {}):
        path = tmp_path / "recipe.yaml"
        fields = {"name": "small", "domain": "chat", "base": BASE | tied, "train": [STAGE]}
        path.write_text(json.dumps(fields | {"evaluate": {"max_new_tokens": 16}}))
        recipe = load_recipe(path, tmp_path)
        context = Context.of(tmp_path, path, recipe, Silent()).on_data("0" * 32)
        version = DataVersion("0" * 32, tmp_path / "data")
        data = validate_stage(context, recipe.validate_, needed=["corpus", "corpus_heldout"], data=version)
        tokenizer = tokenize_stage(context, 270, records=["corpus"], data=data)
        tensors = load_tensors(base_stage(context, recipe.base, seed=1, tokenizer=tokenizer).path)
        layers = [f"model.layers.{number}.self_attn" for number in range(2)]
        alike[bool(tied)] = [
            np.array_equal(tensors[f"{layer}.k_proj.weight"], tensors[f"{layer}.q_proj.weight"]) for layer in layers
        ]
    assert alike == {True: [True, True], False: [False, False]}
