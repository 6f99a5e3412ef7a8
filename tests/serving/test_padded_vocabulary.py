"""Models with more rows in their embeddings than their tokenizer has ids: those rows are never drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from served import HELLO, make_app, running

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.models.shapes import weight_shapes
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> Path:
    """Half of the rows belong to no token, and they are as likely as the others."""
    config = DecoderConfig(
        vocab_size=2 * tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    random = np.random.default_rng(7)
    weights = {
        name: np.ones(shape, np.float32) if "norm" in name else random.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }
    folder = tmp_path_factory.mktemp("padded")
    save_model(folder / "model", config, weights, tokenizer)
    export_model(folder / "model", folder / "exported", precision="fp32", max_length=256)
    return folder / "exported"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_draws_only_ids_of_the_tokenizer(
    exported: Path, tokenizer: ChatTokenizer, temperature: float
) -> None:
    engine = Engine.load(exported, slots=4, threads=1)
    prompts = [tokenizer.encode(text) for text in ("damaged", "items", "reported", "within")]
    answers = engine.generate(prompts, SamplingParams(max_tokens=40, temperature=temperature, seed=1), group=4)
    assert max(token for answer in answers for token in answer.tokens) < tokenizer.vocab_size
    if temperature:  # of the tokens that there are: some 400, nearly equally likely
        mean = np.mean([answer.logprobs for answer in answers])
        assert mean == pytest.approx(-np.log(tokenizer.vocab_size), abs=0.3)
    with pytest.raises(UserError, match=rf"0\.\.{tokenizer.vocab_size - 1}; encode with its tokenizer"):
        engine.check_prompt([tokenizer.vocab_size])


def test_a_sampled_answer_comes_whole_and_streamed(exported: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    scheduler = Scheduler(Engine.load(exported, slots=2, threads=1))
    body = {"messages": HELLO, "max_tokens": 40, "temperature": 1.0, "seed": 3}
    try:
        with running(make_app(tmp_path, scheduler, tokenizer)) as client:
            whole = client.post("/v1/chat/completions", json=body)
            assert whole.status_code == 200
            streamed = client.post("/v1/chat/completions", json=body | {"stream": True}).text
    finally:
        scheduler.close(drain=False)
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == whole.json()["choices"][0]["message"]["content"]
