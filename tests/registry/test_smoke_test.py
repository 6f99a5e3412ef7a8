"""An exported model is tested by letting it answer its domain's example, as the server would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from twinloop.common.errors import UserError
from twinloop.domains.classification import Classification
from twinloop.domains.domain import Domain
from twinloop.domains.returns.domain import domain as returns
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.registry.smoke_test import example_call, smoke_test
from twinloop.training.weights import get_weights, new_decoder


class Chat(Domain):
    name = "chat"
    chat = True


class Topic(BaseModel):
    topic: str


class Wrong(Domain):
    name = "topics"
    request = Topic
    example: ClassVar = {"topic": 7}


class Number(BaseModel):
    number: int


class WithoutExample(Domain):
    name = "topics"
    request = Number


def make_exported(folder: Path, max_length: int, labels: tuple[str, ...] = ()) -> Path:
    tokenizer = train_tokenizer([document.text for document in returns.example_documents], 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_length,
        labels=labels,
    )
    save_model(folder / "model", config, get_weights(new_decoder(config, seed=0)), tokenizer)
    export_model(folder / "model", folder / "exported", precision="fp32", max_length=max_length)
    return folder / "exported"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exported(tmp_path_factory.mktemp("exported"), 1024)


def test_an_answer_that_is_escalated_is_an_answer_and_names_its_checks(exported: Path) -> None:
    answer = smoke_test(exported, returns)
    assert answer.request == returns.example
    assert answer.decision is not None
    assert [reason.predicate for reason in answer.decision.reasons] == ["parsed"]
    assert {passage.document_id for passage in answer.decision.passages} == {"P-7", "P-13"}
    assert "A10234" in str(answer)
    assert "escalated: parsed: " in str(answer)


def test_an_exported_model_that_cannot_read_the_example_answers_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it loads and answers nothing .*too many for this model to read"):
        smoke_test(make_exported(tmp_path, 64), returns)


def test_a_domain_without_decisions_is_tested_with_a_chat(exported: Path) -> None:
    answer = smoke_test(exported, Chat())
    assert answer.decision is None
    assert "Hello!" in str(answer)


def test_a_chat_begins_with_the_domains_example(exported: Path) -> None:
    class Museum(Chat):
        example: Mapping[str, Any] = {"messages": [{"role": "user", "content": "what does a ticket cost?"}]}

    assert "what does a ticket cost?" in str(smoke_test(exported, Museum()))


def test_an_exported_model_that_cannot_read_a_greeting_answers_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it loads and answers nothing"):
        smoke_test(make_exported(tmp_path, 8), Chat())


def test_a_domain_of_texts_without_an_example_is_tested_with_any_text(exported: Path) -> None:
    domain = Classification(["billing", "delivery"])
    assert domain.example == {}
    answer = smoke_test(exported, domain)
    assert answer.request == {"text": "hello"} == example_call(domain)[1]
    assert answer.decision is not None


@pytest.mark.parametrize(("domain", "said"), [(WithoutExample(), "number: should be"), (Wrong(), "topic: should be")])
def test_an_example_that_is_no_request_is_the_domains_mistake(exported: Path, domain: Domain, said: str) -> None:
    with pytest.raises(UserError, match=f"domain topics: its example is no request [(]{said}"):
        smoke_test(exported, domain)


def test_a_reward_model_gives_a_score_whatever_its_domain_decides(tmp_path: Path) -> None:
    exported = make_exported(tmp_path, 1024, ("reward",))
    answer = smoke_test(exported, returns)
    assert answer.decision is None
    assert answer.text == "score 0", "its head is as it starts"
    route, body = example_call(returns, ("reward",))
    assert route == "/v1/classify"
    assert body["input"][-1]["role"] == "assistant"
    with pytest.raises(UserError, match="more tokens than it can read"):
        smoke_test(make_exported(tmp_path / "short", 8, ("reward",)), returns)


def test_a_classifier_answers_as_its_domain_is_asked(tmp_path: Path) -> None:
    domain = Classification(["late", "damaged"], example="it is late")
    exported = make_exported(tmp_path, 256, ("late", "damaged"))
    answer = smoke_test(exported, domain)
    assert answer.decision is not None
    assert answer.decision.decision == "late", "the first of two that are alike"
    assert example_call(domain, domain.labels)[0] == "/v1/decisions"
    assert example_call(Chat(), domain.labels)[0] == "/v1/classify"
