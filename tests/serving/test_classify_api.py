"""`POST /v1/classify` by real HTTP, on exported models with a head: what it gives is what `transformers` gives."""

import numpy as np
import pytest
import torch
from reward_scores import reward_scores
from served import CASE, DOMAIN, HELLO, MODEL, make_app, running, small_tokenizer

from twinloop.models.config import DecoderConfig
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.models.label_tokenizer import load_answering
from twinloop.serving.engine import Engine
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.training.heads import attach_head
from twinloop.training.weights import get_weights, new_decoder

CLASSIFY = "/v1/classify"
LABELS = ("eligible", "late", "unclear")
ANSWERED = [*HELLO, {"role": "assistant", "content": "yes, within 30 days"}]
MAX_LENGTH = 96


def make_model(folder, labels):
    """A model directory and its export, with random weights that tell texts apart."""
    tokenizer = small_tokenizer()
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    model = new_decoder(config, seed=0)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    attach_head(model, labels, tokenizer, tokenizer.stop_ids)
    with torch.no_grad():
        model.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_model(folder / "model", model.config, get_weights(model), tokenizer)
    for precision in ("fp32", "int8"):
        export_model(folder / "model", folder / precision, precision=precision, max_length=MAX_LENGTH)
    return folder


def serve(folder, tmp_path):
    scheduler = Scheduler(Engine.load(folder / "fp32", slots=2, threads=1), queue_size=6)
    return scheduler, make_app(tmp_path, scheduler, load_answering(folder / "fp32"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("classifier"), LABELS)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("reward"), ("reward",))


@pytest.fixture(scope="module")
def labelling(classifier, tmp_path_factory):
    """A server of the classifier."""
    scheduler, app = serve(classifier, tmp_path_factory.mktemp("labelling"))
    with running(app) as client:
        yield client
    scheduler.close(drain=False, timeout_s=20)


@pytest.fixture(scope="module")
def scoring(reward_model, tmp_path_factory):
    """A server of the reward model."""
    scheduler, app = serve(reward_model, tmp_path_factory.mktemp("scoring"))
    with running(app) as client:
        yield client
    scheduler.close(drain=False, timeout_s=20)


def theirs(folder, tokens):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


TEXTS = ["damaged items reported", "late", "can i send order A10234 back?"]


def test_each_text_gets_every_label_with_the_probability_that_transformers_gives(labelling, classifier):
    answer = labelling.post(CLASSIFY, json={"input": TEXTS}).json()
    tokenizer = load_answering(classifier / "model")
    assert [each["index"] for each in answer["data"]] == [0, 1, 2]
    tokens = 0
    for text, found in zip(TEXTS, answer["data"], strict=True):
        prompt = tokenizer.encode_prompt(DOMAIN.text_prompt(text))
        tokens += len(prompt)
        expected = dict(zip(LABELS, theirs(classifier, prompt).softmax(0).tolist(), strict=True))
        assert found["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert list(found["probabilities"]) == sorted(expected, key=expected.get, reverse=True)
        assert found["label"] == max(expected, key=expected.get)
        assert found["probability"] == max(found["probabilities"].values())
    assert (answer["object"], answer["model"]) == ("list", MODEL.name)
    assert answer["system_fingerprint"] == MODEL.digest
    assert answer["usage"]["prompt_tokens"] == tokens
    assert len({tuple(each["probabilities"].values()) for each in answer["data"]}) == len(TEXTS)


def test_one_text_and_its_messages_are_answered_as_in_a_list(labelling):
    several = labelling.post(CLASSIFY, json={"input": TEXTS, "model": f"{MODEL.name}:v3", "priority": 1}).json()["data"]
    messages = [{"role": "user", "content": TEXTS[2]}]
    for given in (TEXTS[2], messages, [messages]):
        (alone,) = labelling.post(CLASSIFY, json={"input": given}).json()["data"]
        assert alone["label"] == several[2]["label"]
        assert alone["probabilities"] == pytest.approx(several[2]["probabilities"], abs=1e-5)


def test_a_reward_model_scores_conversations_as_in_training(scoring, reward_model):
    others = [[*HELLO, {"role": "assistant", "content": text}] for text in ("no", "maybe later")]
    answer = scoring.post(CLASSIFY, json={"input": [ANSWERED, *others]}).json()
    tokenizer = load_answering(reward_model / "model")
    texts = [
        tokenizer.encode_prompt(HELLO) + tokenizer.encode_answer(each[-1]["content"]) for each in [ANSWERED, *others]
    ]
    found = [each["score"] for each in answer["data"]]
    np.testing.assert_allclose(found, reward_scores(reward_model / "model", texts), atol=1e-4)
    assert len(set(found)) == 3
    (alone,) = scoring.post(CLASSIFY, json={"input": ANSWERED}).json()["data"]
    assert alone["score"] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, None),
        ({"input": []}, 400, None),
        ({"input": 7}, 400, None),
        ({"input": "late", "n": 2}, 400, None),
        ({"input": "late", "model": "other"}, 404, "model_not_found"),
        ({"input": "late", "model": f"{MODEL.name}:v9"}, 404, "model_not_found"),
        ({"input": "late " * MAX_LENGTH}, 400, "context_length_exceeded"),
        ({"input": ["late"] * 9}, 400, "too_many_prompts"),
        ({"input": [{"role": "user"}]}, 400, None),
    ],
)
def test_what_cannot_be_classified_is_refused_in_openais_form(labelling, body, status, code):
    answer = labelling.post(CLASSIFY, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert labelling.post(CLASSIFY, json={"input": "late"}).status_code == 200


@pytest.mark.parametrize("given", ["a text", HELLO, [HELLO, ANSWERED], [ANSWERED[-1]]])
def test_a_reward_model_scores_nothing_but_answers(scoring, given):
    answer = scoring.post(CLASSIFY, json={"input": given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


def test_a_head_writes_no_text_and_a_reward_model_decides_nothing(labelling, scoring):
    for client in (labelling, scoring):
        for path, body in (("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})):
            answer = client.post(path, json=body)
            assert answer.status_code == 404
            assert "POST /v1/classify" in answer.json()["error"]["message"]
    assert scoring.post("/v1/decisions", json=CASE).status_code == 404
    assert labelling.post("/v1/decisions", json=CASE).json()["reasons"][0]["predicate"] == "parsed", (
        "a label is no JSON"
    )
    assert labelling.get("/health").json()["purpose"]["routes"] == ["/v1/decisions", CLASSIFY]
    assert scoring.get("/v1/models").json()["data"][0]["routes"] == [CLASSIFY]
    closed = scoring.post("/v1/embeddings", json={"input": "late"})
    assert (closed.status_code, closed.json()["error"]["message"]) == (
        404,
        "/v1/embeddings: not served, since the model is a decoder, which embeds no text; it answers POST /v1/classify",
    )


def test_a_model_that_writes_text_classifies_nothing(client):
    answer = client.post(CLASSIFY, json={"input": "late"})
    assert answer.status_code == 404
    assert "since the model gives text; it answers POST /v1/decisions" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("precision", "gap"), [("fp32", 1e-4), ("int8", 0.5)])
def test_an_exported_head_gives_what_the_network_gives_at_every_position(classifier, precision, gap):
    tokenizer = load_answering(classifier / "model")
    engine = Engine.load(classifier / precision, slots=1, threads=1)
    prompt = tokenizer.encode_prompt(HELLO)
    scores = engine.score(prompt)
    assert scores.shape == (len(prompt), len(LABELS))
    expected = theirs(classifier, prompt).numpy()
    np.testing.assert_allclose(scores[-1], expected, atol=gap)
    np.testing.assert_allclose(engine.prefill(0, prompt), expected, atol=gap)


def test_an_answer_is_the_likeliest_label_and_nothing_more(classifier):
    from twinloop.serving.engine.sampling import SamplingParams

    tokenizer = load_answering(classifier / "fp32")
    engine = Engine.load(classifier / "fp32", slots=2, threads=1)
    prompts = [tokenizer.encode_prompt(DOMAIN.text_prompt(text)) for text in TEXTS]
    for prompt, found in zip(prompts, engine.generate(prompts, SamplingParams(max_tokens=50)), strict=True):
        expected = theirs(classifier, prompt)
        assert tokenizer.decode(found.tokens) == LABELS[int(expected.argmax())]
        assert found.finish_reason == "stop"
        assert found.logprobs == pytest.approx([float(expected.log_softmax(0).max())], abs=1e-4)


def test_a_client_that_waits_no_longer_is_answered_at_once(labelling):
    answer = labelling.post(CLASSIFY, json={"input": "late"}, headers={"x-stainless-read-timeout": "0.000001"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
