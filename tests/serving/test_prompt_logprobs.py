"""Log-probabilities of a prompt's own tokens: those of the network, however the engine comes by them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
import openai
import pytest
import torch
from openai.types import CompletionChoice
from served import MODEL, make_app, running, small_tokenizer

from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.engine.slots import Prompt, SlotBatch

TEXT = "damaged items reported within 30 days"
LONG = TEXT + " are eligible. late items" * 75
SCORED = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
"""As lm-eval asks."""
CLOSE = 1e-4
"""Of a log-probability that the engine and torch compute in float32."""


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def network(tokenizer: ChatTokenizer) -> Decoder:
    return a_network(tokenizer.vocab_size)


@pytest.fixture(scope="module")
def scheduler(network: Decoder) -> Iterator[Scheduler]:
    scheduler = Scheduler(bind(network, max_length=512), queue_size=20)
    yield scheduler
    scheduler.close(drain=False, timeout_s=20)


@pytest.fixture(scope="module")
def official(
    tmp_path_factory: pytest.TempPathFactory, scheduler: Scheduler, tokenizer: ChatTokenizer
) -> Iterator[openai.OpenAI]:
    with running(make_app(tmp_path_factory.mktemp("scored"), scheduler, tokenizer)) as client:
        yield openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def a_network(vocab_size: int, hidden_size: int = 64) -> Decoder:
    """What it says next hangs on every token before."""
    torch.manual_seed(0)
    network = Decoder(
        DecoderConfig(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    ).requires_grad_(False)  # fmt: skip
    for name, weight in network.named_parameters():
        if "norm" not in name:
            weight.mul_(3)
    return network


def bind(network: Decoder, *, max_length: int, slots: int = 3) -> Engine:
    weights = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in network.state_dict().items()}
    return Engine.from_weights(network.config, weights, max_length=max_length, slots=slots, threads=1)


def logprobs_of(network: Decoder, ids: list[int]) -> torch.Tensor:
    """After every token, of every token."""
    tokens = torch.tensor([ids])
    return torch.log_softmax(network.logits(network.hidden(tokens, torch.arange(len(ids))[None]))[0], dim=-1)


def ask(official: openai.OpenAI, prompt: Any, **request: Any) -> list[CompletionChoice]:
    return official.completions.create(model=MODEL.name, prompt=prompt, **{**SCORED, **request}).choices


def check(choice: CompletionChoice, ids: list[int], network: Decoder, tokenizer: ChatTokenizer) -> None:
    """The prompt's entries, and that those of the answer come after them."""
    assert choice.logprobs is not None
    found, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
    expected = logprobs_of(network, ids)[:-1]
    shown = choice.logprobs.tokens[: len(ids)]
    assert [text for text in shown if not text.startswith("bytes:")] == [
        text for id in ids if "\ufffd" not in (text := tokenizer.token_bytes[id].decode(errors="replace"))
    ]
    assert found[0] is None
    assert tops[0] is None
    np.testing.assert_allclose(found[1 : len(ids)], expected[range(len(ids) - 1), ids[1:]], atol=CLOSE)
    for top, logprob, row, id in zip(tops[1:], found[1:], expected, ids[1:], strict=False):
        assert max(top.values()) == pytest.approx(float(row.max()), abs=CLOSE)
        assert (max(top.values()) == logprob) == (int(row.argmax()) == id)


@pytest.mark.parametrize("kind", ["text", "texts", "ids", "lists of ids"])
def test_every_form_of_prompt_has_the_networks_logprobs(official, network, tokenizer, kind):
    texts = [TEXT, LONG, "late"]
    ids = [tokenizer.encode_text(text) for text in texts]
    prompt = {"text": texts[0], "texts": texts, "ids": ids[0], "lists of ids": ids}[kind]
    choices = ask(official, prompt)
    assert len(choices) == (3 if kind in ("texts", "lists of ids") else 1)
    for choice, each in zip(choices, ids, strict=False):
        check(choice, each, network, tokenizer)
        assert len(choice.logprobs.tokens) == len(each) + 1
    assert len(ids[1]) > 256  # it is read in several pieces


def test_sampling_does_not_change_them(official, network, tokenizer):
    ids = tokenizer.encode(TEXT)
    ways = {"temperature": 0.3, "top_p": 0.4, "logit_bias": {str(ids[3]): -100}, "frequency_penalty": 2.0, "n": 2}
    for choice in ask(official, ids, **ways, max_tokens=4):
        check(choice, ids, network, tokenizer)


def test_a_prompt_that_slots_hold_already_is_scored_as_a_new_one(official, network, tokenizer):
    def cached(**request: Any) -> int:
        usage = official.completions.create(model=MODEL.name, prompt=LONG, max_tokens=2, **request).usage
        return usage.prompt_tokens_details.cached_tokens

    cached()
    assert cached() > 0
    assert cached(echo=True) > 0
    assert cached(echo=True, logprobs=1) == 0
    check(ask(official, LONG)[0], tokenizer.encode_text(LONG), network, tokenizer)
    check(ask(official, LONG + " days")[0], tokenizer.encode_text(LONG + " days"), network, tokenizer)
    assert cached() > 0  # what was read for them is there for others


def test_more_answers_than_slots_all_show_the_prompt(official, network, tokenizer):
    prompts = [tokenizer.encode_text(text) for text in (TEXT, LONG)]
    choices = ask(official, prompts, n=5, temperature=1)
    assert len(choices) == 10
    for choice in choices:
        check(choice, prompts[choice.index // 5], network, tokenizer)


@pytest.mark.parametrize("max_tokens", [0, 1, 9])
def test_a_stream_has_what_the_whole_has(official, max_tokens):
    whole = ask(official, [TEXT, "late items"], max_tokens=max_tokens, logprobs=3)
    parts: dict[int, list[CompletionChoice]] = {0: [], 1: []}
    request = SCORED | {"max_tokens": max_tokens, "logprobs": 3}
    for chunk in official.completions.create(model=MODEL.name, prompt=[TEXT, "late items"], stream=True, **request):
        for choice in chunk.choices:
            parts[choice.index].append(choice)
    for choice in whole:
        said = parts[choice.index]
        assert "".join(part.text for part in said) == choice.text
        assert said[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [each for part in said if part.logprobs for each in getattr(part.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)


def test_no_tokens_asked_for_show_the_prompt_alone(official, network, tokenizer):
    ids = tokenizer.encode_text(TEXT)
    answer = official.completions.create(model=MODEL.name, prompt=TEXT, **SCORED | {"max_tokens": 0})
    (choice,) = answer.choices
    check(choice, ids, network, tokenizer)
    assert len(choice.logprobs.tokens) == len(ids)
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (TEXT, "length", 0)
    plain = official.completions.create(model=MODEL.name, prompt=TEXT, max_tokens=0, echo=True).choices[0]
    assert (plain.text, plain.logprobs) == (TEXT, None)


def test_the_token_that_ends_an_answer_is_reported(official, network, tokenizer):
    """lm-eval takes what is before the last entry for the prompt's, so one entry must follow it always."""
    ids = tokenizer.encode_text(TEXT)
    (choice,) = ask(official, ids, logit_bias={str(tokenizer.stop_id): 100})
    check(choice, ids, network, tokenizer)
    assert (choice.text, choice.finish_reason) == (tokenizer.decode_all(ids), "stop")
    assert choice.logprobs.tokens[len(ids) :] == [tokenizer.token_bytes[tokenizer.stop_id].decode()]
    own = float(logprobs_of(network, ids)[-1, tokenizer.stop_id])
    assert choice.logprobs.token_logprobs[-1] == pytest.approx(own, abs=CLOSE)


@pytest.mark.parametrize("as_ids", [False, True])
def test_each_token_is_at_its_place_in_the_text(official, tokenizer, as_ids):
    text = "late grüße 漢字, 30 days"
    ids = tokenizer.encode_text(text)
    (choice,) = ask(official, ids if as_ids else text, max_tokens=3)
    logprobs = choice.logprobs
    assert choice.text.startswith("<|bos|>" + text if as_ids else text)
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    begins = list(zip(logprobs.tokens, logprobs.text_offset, strict=True))[1 : len(ids)]
    assert any(token.startswith("bytes:") for token, _ in begins)
    for token, offset in begins:
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset[len(ids)] == len("<|bos|>" + text if as_ids else text)


def test_a_prompt_that_is_given_up_and_read_again_has_them_once(network, tokenizer):
    ids = tokenizer.encode_text(TEXT)
    batch, params = SlotBatch(bind(network, max_length=512)), SamplingParams(max_tokens=2)
    prompt = Prompt(ids, top_logprobs=0)
    (slot,) = batch.admit_reusing(prompt, params)
    batch.read_prompt(7)
    batch.release(slot)
    batch.admit_reusing(prompt, params, [1])
    while batch.reading:
        batch.read_prompt(5)
    batch.admit_reusing(prompt, params, [2])
    batch.read_prompt(5)
    expected = logprobs_of(network, ids)[range(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([report.logprob for report in prompt.reports], expected, atol=CLOSE)


def test_logits_of_long_prompts_are_neither_held_at_once_nor_kept():
    vocabulary, lengths, limit = 50_000, (500, 490, 480), 2**24
    scheduler = Scheduler(bind(a_network(vocabulary, hidden_size=16), max_length=512), prefill_tokens=max(lengths))
    tracemalloc.start()
    try:
        for length in lengths:
            ids = np.random.default_rng(length).integers(0, vocabulary, length).tolist()
            with scheduler.reserve() as place:
                (stream,) = place.submit(ids, SamplingParams(max_tokens=1), prompt_logprobs=1)
            list(stream)
            assert len(stream.prompt.reports) == length - 1
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        scheduler.close(drain=False, timeout_s=20)
    assert peak < 3 * limit < 4 * vocabulary * min(lengths)
    assert held < limit / 2
