"""Every family computes what `transformers` computes: the network, and the engine past its windows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from family_cases import VOCABULARY, build, random_config
from transformers import AutoModelForCausalLM

from twinloop.models.directory import load_config, save_model
from twinloop.models.exported import export_model
from twinloop.models.family import read_config, write_config
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.weights import get_weights, load_decoder

FAMILIES = ["gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3"]
LENGTH, ANSWER = 40, 24


def tokens_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def compare(family: str, seed: int, folder) -> None:
    theirs = build(random_config(family, seed), seed)
    theirs.save_pretrained(folder / "theirs")
    tokens = tokens_of(seed, 2, LENGTH)
    expected = theirs(tokens).logits
    assert expected.std() > 0.1

    ours = load_decoder(folder / "theirs")
    assert ours.config.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())
    hidden = ours.hidden(tokens, torch.arange(LENGTH).expand(2, -1))
    torch.testing.assert_close(ours.logits(hidden), expected, atol=1e-4, rtol=0)

    save_model(folder / "ours", ours.config, get_weights(ours))
    assert load_config(folder / "ours") == ours.config
    again, info = AutoModelForCausalLM.from_pretrained(
        folder / "ours", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=0)

    export_model(folder / "ours", folder / "fp32", precision="fp32", max_length=LENGTH + ANSWER)
    engine = Engine.load(folder / "fp32", slots=2, threads=1)
    for chunk in (LENGTH, 7):
        np.testing.assert_allclose(engine.score(tokens[0].numpy(), chunk=chunk), expected[0].numpy(), atol=1e-4)
    prompts = [tokens[0, :LENGTH].tolist(), tokens[1, :5].tolist()]
    answers = engine.generate(prompts, SamplingParams(max_tokens=ANSWER, temperature=0.0))
    for prompt, answer in zip(prompts, answers, strict=True):
        chosen = theirs.generate(torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False)
        assert answer.tokens == chosen[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_computes(family, tmp_path):
    compare(family, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 25))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_computes_what_transformers_computes(family, seed, tmp_path):
    compare(family, seed, tmp_path)
