"""The load test of an exported model, in the process of its own in which it runs."""

import pytest

from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.tasks.load_test import run_load_test
from twinloop.training.weights import get_weights, new_decoder

CONFIG = DecoderConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = train_tokenizer(["a text"], CONFIG.vocab_size)
    save_model(folder / "model", CONFIG, get_weights(new_decoder(CONFIG, seed=0)), tokenizer)
    export_model(folder / "model", folder / "onnx", precision="fp32", max_length=64)
    return folder / "onnx"


@pytest.mark.parametrize("form", [None, {"choice": ["a", "b"]}])
def test_every_prompt_is_answered_and_timed(exported, form):
    prompts = [[1, 2, 3 + index] for index in range(6)]
    result = run_load_test(exported, prompts, max_tokens=8, form=form, slots=2, threads=1)
    assert 0 < result.p50_ttft_ms <= result.p95_ttft_ms
    assert result.tokens_per_s > 0
    assert 0 < result.memory_gib < 4


def test_a_failure_names_its_cause(exported):
    with pytest.raises(RuntimeError, match="token ids must lie in"):
        run_load_test(exported, [[CONFIG.vocab_size]], max_tokens=8, form=None, slots=1, threads=1)
