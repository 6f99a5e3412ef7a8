"""The smallest and largest values of every sampling parameter: answered as their limit, or refused by name."""

import numpy as np
import pytest
from served import HELLO

from twinloop.serving.engine.sampling import AnswerSampler, SamplingParams

TINY = (5e-324, 1e-308, 1e-60, 1e-45, 1e-40, 1.2e-38, 1e-20, 1e-9)


def answer(client, **settings):
    body = {"messages": HELLO, "max_tokens": 12, **settings}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("tiny", TINY)
def test_a_temperature_or_a_share_that_is_next_to_nothing_is_greedy(client, tiny):
    greedy = answer(client, temperature=0)
    assert answer(client, temperature=tiny) == greedy
    assert answer(client, temperature=tiny, top_p=tiny, seed=3) == greedy
    assert answer(client, temperature=1.0, top_p=tiny, seed=3) == greedy
    assert answer(client, temperature=2.0, top_p=tiny) == greedy
    plain = answer(client, temperature=1.0, seed=3)
    assert answer(client, temperature=1.0, seed=3, min_p=tiny, frequency_penalty=tiny, presence_penalty=-tiny) == plain


def test_the_narrowest_cuts_are_greedy(client):
    greedy = answer(client, temperature=0)
    assert answer(client, temperature=2.0, top_k=1) == answer(client, temperature=2.0, min_p=1) == greedy


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**63), 2**200])
def test_any_seed_repeats_itself(client, seed):
    assert answer(client, seed=seed) == answer(client, seed=seed)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "NaN"),
        ("temperature", "Infinity"),
        ("temperature", "1e400"),
        ("top_p", "NaN"),
        ("top_p", "-0.0"),
        ("top_k", "-2"),
        ("top_k", "1.5"),
        ("min_p", "NaN"),
        ("min_p", "1.01"),
        ("frequency_penalty", "2.1"),
        ("presence_penalty", "-Infinity"),
        ("repetition_penalty", "0"),
        ("repetition_penalty", "1e-300"),
        ("logit_bias", "[]"),
        ("logit_bias", '{"5": 101}'),
        ("logit_bias", '{"-1": 1}'),
        ("logit_bias", '{"5": null}'),
        ("logit_bias", '{"123456789": 1}'),
        ("n", "0"),
        ("n", "129"),
        ("n", "100"),
        ("logprobs", "1"),
        ("top_logprobs", "2"),
        ("top_logprobs", "21"),
        ("min_tokens", "-1"),
        ("ignore_eos", '"yes"'),
        ("best_of", "2"),
    ],
)
def test_what_is_no_such_number_is_refused_by_name(client, name, text):
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "{name}": {text}}}'.encode()
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].split(".")[0] == name
    assert error["message"].startswith(error["param"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
        ("min_tokens", {"min_tokens": 1, "response_format": {"type": "json_object"}}),
        ("ignore_eos", {"ignore_eos": True, "response_format": {"type": "json_object"}}),
        ("top_logprobs", {"top_logprobs": 1, "logprobs": False}),
    ],
)
def test_what_cannot_be_served_together_is_refused_by_name(client, name, settings):
    response = client.post("/v1/chat/completions", json={"messages": HELLO, **settings})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("top_p", [np.float32(1e-45), np.float64(5e-324), np.float32(1e-20)])
def test_the_likeliest_token_is_always_among_those_drawn_from(top_p):
    logits = np.array([0.0, 3.0, 2.9, -50.0], np.float32)
    sampler = AnswerSampler(SamplingParams(temperature=1.0, top_p=top_p), [])
    assert sampler.draw(logits, 0.999)[:2] == (1, 0.0)


def test_a_temperature_below_what_float32_can_divide_by_is_zero():
    assert [SamplingParams(temperature=tiny).temperature for tiny in TINY] == [0.0] * len(TINY)
    assert SamplingParams(temperature=1e-5).temperature == 1e-5
