"""What tokens are drawn, against a plain reference: the whole distribution in float64, sorted and cut."""

from __future__ import annotations

import numpy as np
import pytest

from twinloop.common.errors import UserError
from twinloop.serving.engine.sampling import AnswerSampler, SamplingParams, choose, draw, uniform_draws

LETTERS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probability of each token, float64."""
    scaled = logits.astype(np.float64) / params.temperature
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    shares[shares < params.min_p * shares.max() * (1 - 1e-6)] = 0
    order = np.argsort(-shares, kind="stable")
    if params.top_k > 0:
        shares[order[params.top_k :]] = 0
    shares /= shares.sum()
    before = np.cumsum(shares[order]) - shares[order]
    shares[order[1:][before[1:] >= params.top_p]] = 0
    return shares / shares.sum()


def draw_many(logits: np.ndarray, params: SamplingParams, uniform: np.ndarray, prompt=()):
    """One token for each of the uniform draws, of answers that all begin here."""
    samplers = {row: AnswerSampler(params, prompt) for row in range(len(uniform))}
    rows = np.broadcast_to(logits, (len(uniform), len(logits)))
    return draw(rows, np.full(len(uniform), params.temperature, np.float32), uniform, samplers)


def test_plain_draws_follow_the_distribution():
    count = 20_000
    uniform, rows = uniform_draws(1, 0, count), np.broadcast_to(LETTERS, (count, 4))
    for temperature, expected in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.5, [0.685, 0.247, 0.062, 0.007])):
        tokens, logprobs = choose(rows, np.full(count, temperature, np.float32), uniform)
        np.testing.assert_allclose(np.bincount(tokens, minlength=4) / count, expected, atol=0.015)
        np.testing.assert_allclose(np.exp(logprobs), np.array(expected)[tokens], atol=1e-3)


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"top_p": 0.9}, [0.526, 0.316, 0.158, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": -1, "min_p": 0.2}, [0.526, 0.316, 0.158, 0]),
        ({"min_p": 0.2, "top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"top_k": 9, "top_p": 1.0, "min_p": 1e-9}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_cut_draws_follow_the_distribution(cut, expected):
    params = SamplingParams(temperature=1.0, **cut)
    tokens, logprobs, _ = draw_many(LETTERS, params, (np.arange(2000) + 0.5) / 2000)
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 2000, expected, atol=1e-3)
    np.testing.assert_allclose(np.exp(logprobs), np.array(expected)[tokens], atol=1e-3)


VOCABULARY = 20_011
RANDOM = np.random.default_rng(0)
SHAPES = {
    "sharp": -1.5 * np.log(1 + RANDOM.permutation(VOCABULARY)),
    "flat": RANDOM.normal(0, 0.3, VOCABULARY),
    "wide": -0.95 * np.log(1 + RANDOM.permutation(VOCABULARY)),
    "even": np.zeros(VOCABULARY),
    # The tokens that the sample sees are not like the others.
    "striped": np.where(np.arange(VOCABULARY) % 10 == 0, 3.0, 0.0) + RANDOM.normal(0, 0.3, VOCABULARY),
    "tied": RANDOM.integers(0, 4, VOCABULARY) * 2.0,
    "masked": np.where(RANDOM.random(VOCABULARY) < 0.01, RANDOM.normal(0, 2, VOCABULARY), -np.inf),
}
CUTS = [
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"top_k": 40},
    {"top_k": 256, "top_p": 0.95},
    {"top_k": 5003, "top_p": 0.95},
    {"min_p": 0.3},
    {"min_p": 0.001, "top_p": 0.8},
    {"min_p": 1.0},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_vocabulary_is_cut_as_if_it_were_sorted(shape, cut):
    logits = SHAPES[shape].astype(np.float32)
    params = SamplingParams(temperature=0.8, **cut)
    shares = reference(logits, params)
    uniform = np.random.default_rng(1).random(12)
    tokens, logprobs, _ = draw_many(logits, params, uniform)
    np.testing.assert_allclose(np.exp(logprobs), shares[tokens], rtol=2e-3)
    # The draw falls into the token's part of the cumulative distribution, in the order of the vocabulary.
    end = np.cumsum(shares)[tokens]
    assert (uniform <= end + 1e-4).all()
    assert (uniform >= end - shares[tokens] - 1e-4).all()


def test_rows_of_a_batch_are_drawn_each_in_its_own_way():
    random = np.random.default_rng(0)
    logits = random.standard_normal((6, 500)).astype(np.float32) * 3
    all_params = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, top_p=0.3),
        SamplingParams(temperature=2.0),
        SamplingParams(temperature=1.0, top_k=7, presence_penalty=1.0),
        SamplingParams(logit_bias={9: 100.0}, top_logprobs=2),
    ]
    temperature = np.array([params.temperature for params in all_params], np.float32)
    uniform = np.array([0.1, 0.9999999999999999, 0.5, 0.3, 0.7, 0.2])

    def drawn(rows):
        samplers = {at: AnswerSampler.if_needed(all_params[row], [1]) for at, row in enumerate(rows)}
        needed = {at: sampler for at, sampler in samplers.items() if sampler is not None}
        assert [rows[at] for at in needed] == [row for row in rows if row in (2, 4, 5)]
        return draw(logits[rows], temperature[rows], uniform[rows], needed)

    tokens, logprobs, reports = drawn([0, 1, 2, 3, 4, 5])
    assert tokens[0] == logits[0].argmax()
    assert tokens[5] == 9
    assert list(reports) == [5]
    for row in range(6):
        token, logprob, report = drawn([row])
        assert (token[0], logprob[0]) == (tokens[row], pytest.approx(logprobs[row], abs=1e-6))
        assert report.get(0) == reports.get(row)


def test_many_rows_of_a_large_vocabulary_are_drawn_as_each_alone():
    random = np.random.default_rng(0)
    logits, uniform = random.standard_normal((12, 50_000)).astype(np.float32), random.random(12)
    temperature = np.full(12, 0.7, np.float32)
    tokens, logprobs = choose(logits, temperature, uniform)
    alone = [choose(logits[[row]], temperature[[row]], uniform[[row]]) for row in range(12)]
    assert tokens.tolist() == [int(token[0]) for token, _ in alone]
    assert logprobs.tolist() == [float(logprob[0]) for _, logprob in alone]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.8, "logit_bias": {3: 2.5, 7: -100}},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 1.1},
        {"frequency_penalty": -0.5, "presence_penalty": 2.0, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_penalties_and_biases_are_those_of_the_reference(settings):
    """At temperature 0, over 300 tokens; 100 of a vocabulary of 120 come again and again."""
    params, prompt, answer = SamplingParams(**settings), [1, 5, 5, 100], list[int]()
    sampler, random = AnswerSampler(params, prompt), np.random.default_rng(2)
    for _ in range(300):
        logits = random.normal(0, 1.5, 120).astype(np.float32)
        expected = logits.astype(np.float64)
        for token, bias in (params.logit_bias or {}).items():
            expected[token] += bias
        for token in {*prompt, *answer}:
            factor = params.repetition_penalty
            expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
        for token in set(answer):
            expected[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
        before = logits.copy()
        token, logprob, _ = sampler.draw(logits, 0.5)
        assert token == expected.argmax()
        assert logprob == pytest.approx(expected[token] - np.log(np.exp(expected).sum()), abs=1e-4)
        assert (logits == before).all()
        answer.append(token)


def test_no_stop_token_comes_before_min_tokens():
    logits = np.array([0.0, 9.0, 8.0, 1.0], np.float32)
    sampler = AnswerSampler(SamplingParams(min_tokens=2, stop=(1, 2)), [])
    assert [sampler.draw(logits, 0.5)[0] for _ in range(3)] == [3, 3, 1]


def test_reports_are_of_the_models_own_distribution():
    params = SamplingParams(temperature=0.3, top_k=1, logit_bias={3: 50.0}, top_logprobs=3)
    tokens, _, reports = draw_many(LETTERS, params, np.array([0.5]))
    assert tokens[0] == 3
    assert reports[0].logprob == pytest.approx(np.log(0.05), abs=1e-6)
    assert list(reports[0].top) == [0, 1, 2]
    np.testing.assert_allclose(list(reports[0].top.values()), LETTERS[:3], atol=1e-6)
    assert AnswerSampler(SamplingParams(top_logprobs=0), []).draw(LETTERS, 0.5)[2].top == {}


def test_draws_depend_on_seed_and_sequence_alone():
    draws = uniform_draws(3, 1, 10)
    assert (uniform_draws(3, 1, 4) == draws[:4]).all()
    assert not np.isin(draws, uniform_draws(3, 2, 10)).any()
    assert not np.isin(draws, uniform_draws(4, 1, 10)).any()
    assert len(uniform_draws(-1, 0, 3)) == len(uniform_draws(2**70, 0, 3)) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"top_k": -2},
        {"min_p": float("nan")},
        {"frequency_penalty": 2.1},
        {"presence_penalty": -3},
        {"repetition_penalty": 0.0},
        {"logit_bias": {4: 101.0}},
        {"min_tokens": -1},
        {"top_logprobs": 21},
    ],
    ids=str,
)
def test_sampling_out_of_bounds_is_refused(wrong):
    with pytest.raises(UserError, match=f"sampling: {next(iter(wrong))} is .* it must be"):
        SamplingParams(**wrong)
