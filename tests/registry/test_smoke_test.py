"""A bundle proves that it answers by deciding the example order, as the server would."""

from __future__ import annotations

from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.onnx_bundle import export_bundle
from twinloop.models.tokenizer import train_tokenizer
from twinloop.registry.smoke_test import EXAMPLE_POLICIES, prove_answers
from twinloop.training.weights import get_weights, new_decoder


def make_bundle(folder: Path, max_length: int) -> Path:
    tokenizer = train_tokenizer([policy.text for policy in EXAMPLE_POLICIES], 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_length,
    )
    save_model(folder / "model", config, get_weights(new_decoder(config, seed=0)), tokenizer)
    export_bundle(folder / "model", folder / "bundle", precision="fp32", max_length=max_length)
    return folder / "bundle"


def test_an_answer_that_is_escalated_is_an_answer_and_tells_its_checks(tmp_path: Path) -> None:
    answer = prove_answers(make_bundle(tmp_path, 1024))
    assert answer.escalated
    assert [reason.predicate for reason in answer.reasons] == ["parsed"]
    assert {passage.policy_id for passage in answer.passages} == {"P-7", "P-13"}


def test_a_bundle_that_cannot_read_the_order_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it loads and answers nothing .*too many for this model to read"):
        prove_answers(make_bundle(tmp_path, 64))
