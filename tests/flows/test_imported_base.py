"""A recipe on a base that somebody else made, to a champion; then on from that champion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_project import RECIPE, STAGES, make_ready_project, twinloop

from twinloop.domains.returns.case_maker import GeneratorParams
from twinloop.domains.returns.generator import generate
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.registry.versions import Registry

pytestmark = pytest.mark.slow


def write_base(folder: Path, texts: list[str]) -> None:
    """An untrained Llama as transformers saves it, in bf16 and shards, with a tokenizer for these texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(texts, 400)
    config = LlamaConfig(
        vocab_size=416,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


def write_recipe(project: Path, base: dict[str, object]) -> None:
    stages = [{"method": "sft", **STAGES["sft"]}]
    (project / "recipes" / "small.yaml").write_text(json.dumps(RECIPE | {"base": base, "train": stages}))


def test_a_base_is_trained_to_a_champion_and_the_champion_is_trained_further(tmp_path: Path) -> None:
    project = make_ready_project(tmp_path / "project")
    counts = {name: 40 for name, field in GeneratorParams.model_fields.items() if field.is_required()}
    generate(GeneratorParams(**counts), tmp_path / "raw")
    corpus = (tmp_path / "raw" / "corpus.jsonl").read_text().splitlines()
    write_base(project / "models-of-others" / "small", [json.loads(line)["text"] for line in corpus])

    write_recipe(project, {"path": "models-of-others/small", "max_length": 512})
    done = twinloop(project, "run")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "parameters, bf16, mit)" in done.stdout
    assert "promoted: small version 1" in done.stdout
    registry = Registry.of(project, "small")
    tags = registry.version(1).tags
    assert tags["base"].startswith("models-of-others/small (")
    assert tags["base_license"] == "mit"
    assert not (project / "artifacts" / "tokenize").exists()
    card = registry.mlruns.client.get_model_version("small", "1").description
    assert "models-of-others/small (" in card

    again = twinloop(project, "run")
    assert again.returncode == 0, again.stderr
    assert "champion already: small version 1" in again.stdout

    write_recipe(project, {"version": "champion"})
    further = twinloop(project, "run")
    assert further.returncode == 0, further.stderr + further.stdout
    assert "promoted: small version 2" in further.stdout
    chain = [str(each) for each in registry.lineage(registry.version(2))]
    assert chain == ["small version 2", "small-checkpoints version 3", "small-checkpoints version 1"]
    assert registry.version(2).tags["base"].startswith("small version 1, checkpoint small-checkpoints/1 (")
    assert registry.version(2).tags["base_license"] == "mit"

    (project / "models-of-others" / "small" / "config.json").write_text("{}")
    write_recipe(project, {"path": "models-of-others/small"})
    refused = twinloop(project, "run")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "base: " in refused.stderr
    assert twinloop(project, "status").returncode == 0
