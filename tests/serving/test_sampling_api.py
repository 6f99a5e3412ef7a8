"""Sampling over HTTP, as OpenAI's own client asks for it: several choices, logprobs, biases, penalties."""

from __future__ import annotations

import math
from collections import Counter

import openai
import pytest
from served import HELLO

ASKED = {"model": "returns", "messages": HELLO, "max_tokens": 24, "temperature": 1.0, "seed": 6}


@pytest.fixture(scope="module")
def chat(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0).chat.completions


def text_of(completion) -> str:
    return completion.choices[0].message.content


def streamed(chat, **settings):
    """Of each choice: its text, its logprobs and why it ended; and the usage."""
    texts, logprobs, ends, usage = Counter(), {}, {}, None
    for chunk in chat.create(**ASKED | settings, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = (texts[choice.index] or "") + (choice.delta.content or "")
            logprobs.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
            ends[choice.index] = choice.finish_reason
    return dict(texts), logprobs, ends, usage


@pytest.mark.parametrize(
    ("official", "more"),
    [
        ({"frequency_penalty": 2.0}, {}),
        ({"presence_penalty": -2.0}, {}),
        ({"top_p": 0.5}, {}),
        ({"logit_bias": {"270": 3}}, {}),
        ({}, {"top_k": 3}),
        ({}, {"min_p": 0.2}),
        ({}, {"repetition_penalty": 1.8}),
        ({}, {"min_tokens": 24, "ignore_eos": True}),
    ],
    ids=str,
)
def test_each_parameter_is_applied_and_repeats_itself(chat, official, more):
    def answer():
        return text_of(chat.create(**ASKED | official, extra_body=more))

    assert answer() == answer()
    if "ignore_eos" not in more:
        assert answer() != text_of(chat.create(**ASKED))


@pytest.mark.parametrize("count", [3, 7])
def test_choices_are_different_sequences_of_one_seed(chat, engine_scheduler, count):
    before = engine_scheduler.metrics().totals.prompt_tokens
    completion = chat.create(**ASKED, n=count)
    assert [choice.index for choice in completion.choices] == list(range(count))
    texts = [choice.message.content for choice in completion.choices]
    assert len(set(texts)) == count
    assert texts[0] == text_of(chat.create(**ASKED))
    usage = completion.usage
    assert engine_scheduler.metrics().totals.prompt_tokens - before == 2 * usage.prompt_tokens
    assert usage.completion_tokens <= 24 * count
    pieces, _, ends, streamed_usage = streamed(chat, n=count)
    assert [pieces[index] for index in range(count)] == texts
    assert [ends[index] for index in range(count)] == [choice.finish_reason for choice in completion.choices]
    assert streamed_usage == usage


@pytest.mark.parametrize("settings", [{}, {"stop": ["e", "5"]}, {"temperature": 0}], ids=str)
def test_logprobs_are_of_the_tokens_of_the_text(chat, settings):
    asked = ASKED | settings
    choice = chat.create(**asked, logprobs=True, top_logprobs=4).choices[0]
    entries = choice.logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert text.startswith(choice.message.content)
    assert entries
    for entry in entries:
        assert entry.token == bytes(entry.bytes).decode(errors="replace")
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert len(entry.top_logprobs) == 4
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1
        if asked["temperature"] == 0:
            assert entry.token == entry.top_logprobs[0].token
    pieces, logprobs, _, _ = streamed(chat, **settings, logprobs=True, top_logprobs=4)
    assert (pieces[0], logprobs[0]) == (choice.message.content, entries)
    assert chat.create(**asked, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat.create(**asked).choices[0].logprobs is None


def test_an_answer_may_be_kept_from_ending(chat, tokenizer):
    end = {str(stop): 100 for stop in tokenizer.stop_ids}

    def tokens(**more):
        completion = chat.create(**ASKED | {"temperature": 0}, logit_bias=end, extra_body=more)
        return completion.usage.completion_tokens, completion.choices[0].finish_reason

    assert tokens() == (1, "stop")
    assert tokens(min_tokens=5) == (6, "stop")
    assert tokens(ignore_eos=True) == (24, "length")


def test_a_biased_token_is_always_drawn_and_banned_ones_never(chat, tokenizer):
    (token,) = tokenizer.encode("z")[:1]
    always = chat.create(**ASKED, logit_bias={str(token): 100})
    assert set(text_of(always)) == {"z"}
    banned = {str(id): -100 for id in range(tokenizer.vocab_size) if id != token}
    assert set(text_of(chat.create(**ASKED, logit_bias=banned))) == {"z"}


def test_a_stop_string_ends_no_answer_before_min_tokens(chat):
    """Where a string would end the answer within the first tokens, the text goes on until it comes again."""
    whole = text_of(chat.create(**ASKED, extra_body={"ignore_eos": True}))
    stop = whole[3]
    assert stop not in text_of(chat.create(**ASKED, stop=stop))
    later = chat.create(**ASKED, stop=stop, extra_body={"min_tokens": 12, "ignore_eos": True})
    assert whole.startswith(text_of(later))
    assert stop in text_of(later)
    assert later.usage.completion_tokens > 12
    pieces, _, _, _ = streamed(chat, stop=stop, extra_body={"min_tokens": 12, "ignore_eos": True})
    assert pieces[0] == text_of(later)
