"""onnxruntime-genai loads the directory and chooses the tokens that our engine chooses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_tokenizer import CONVERSATION, TEXTS, known_tokenizer, make_model

from twinloop.models.exported import export_model
from twinloop.models.genai import write_genai
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams

onnxruntime_genai = pytest.importorskip("onnxruntime_genai")  # it has wheels for some platforms only

FORMS = [
    ("fp32", {}),
    ("fp32", {"attention_bias": True, "tie_word_embeddings": True}),
    ("fp32", {"qk_norm": True}),
    ("int8", {}),
    ("int8", {"tie_word_embeddings": True}),
    ("int4", {"tie_word_embeddings": True}),
]


@pytest.fixture(params=FORMS, ids=["llama", "qwen2, tied", "qwen3", "int8", "int8, tied", "int4, tied"])
def forms(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Path]]:
    """An exported model in our engine, and the directory for genai."""
    precision, changes = request.param
    make_model(tmp_path / "model", known_tokenizer(), **changes)
    export_model(tmp_path / "model", tmp_path / "exported", precision=precision, max_length=128)
    (tmp_path / "genai").mkdir()
    write_genai(tmp_path / "exported", tmp_path / "genai")
    return Engine.load(tmp_path / "exported", slots=1, threads=1), tmp_path / "genai"


def answers(model: Any, prompts: list[list[int]], **options: object) -> list[list[int]]:
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(batch_size=len(prompts), **options)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array(prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[len(prompts[0]) :].tolist() for row in range(len(prompts))]


def test_greedy_tokens_logits_and_prompts_are_those_of_our_engine(forms: tuple[Engine, Path]) -> None:
    engine, folder = forms
    ours, model = known_tokenizer(), onnxruntime_genai.Model(str(folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    for text in (*TEXTS, "  12  times\n\n don't"):
        assert tokenizer.encode(text).tolist() == ours.encode(text)
    prompt = ours.encode_prompt(CONVERSATION)
    rendered = tokenizer.apply_chat_template(json.dumps(CONVERSATION), add_generation_prompt=True)
    assert tokenizer.encode(rendered).tolist() == prompt
    other = [*prompt[:-3], *reversed(prompt[-3:])]
    greedy = SamplingParams(max_tokens=20, stop=(ours.stop_id,))
    expected = [list(answer.tokens) for answer in engine.generate([prompt, other], greedy)]
    assert len(set(expected[0])) > 5  # an answer that repeats one token would say little
    length = len(prompt) + 20
    assert answers(model, [prompt, other], max_length=length) == expected
    assert answers(model, [prompt], max_length=length, past_present_share_buffer=False) == expected[:1]
    generator = onnxruntime_genai.Generator(model, onnxruntime_genai.GeneratorParams(model))
    generator.append_tokens(np.array([prompt], np.int32))
    logits_V = generator.get_logits()[0, -1]
    np.testing.assert_allclose(logits_V, engine.score(prompt)[-1], atol=2e-4)


def test_the_config_names_length_stop_token_and_greedy_answers(tmp_path: Path) -> None:
    ours = known_tokenizer()
    make_model(tmp_path / "model", ours)
    export_model(tmp_path / "model", tmp_path / "exported", precision="fp32", max_length=100)
    (tmp_path / "genai").mkdir()
    write_genai(tmp_path / "exported", tmp_path / "genai")
    config = json.loads((tmp_path / "genai" / "genai_config.json").read_text())
    model, search = config["model"], config["search"]
    assert (model["context_length"], model["eos_token_id"], model["type"]) == (100, ours.stop_id, "llama")
    assert (search["max_length"], search["do_sample"]) == (100, False)
    weights = "model.onnx.data"
    assert (tmp_path / "genai" / weights).read_bytes() == (tmp_path / "exported" / weights).read_bytes()
