"""Answers whose next tokens are guessed and computed together are those that are computed token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import test_structured
from served import small_tokenizer
from test_scheduler import prompt_of, small_engine, varied_engine, wait_for

from twinloop.serving.engine import Engine
from twinloop.serving.engine.drafts import Drafts, look_up
from twinloop.serving.engine.grammar import Grammars
from twinloop.serving.engine.sampling import ConstraintError, SamplingParams
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.engine.slots import Prompt, SlotBatch

LONG = SamplingParams(max_tokens=200)
KEYS = ["evidence", "policy", "eligible"]
SCHEMA = {
    "type": "object",
    "properties": {key: {"type": "boolean"} for key in KEYS},
    "required": KEYS,
    "additionalProperties": False,
}


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(small_engine(slots=2))
    yield scheduler
    scheduler.close(drain=False, timeout_s=10)


@pytest.fixture
def slowly(monkeypatch) -> Callable[[str, float], None]:
    """Make a method of all engines take so many seconds more."""

    def slow(name: str, seconds: float) -> None:
        method = getattr(Engine, name)
        monkeypatch.setattr(Engine, name, lambda *given: (time.sleep(seconds), method(*given))[1])

    return slow


def begun(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[SlotBatch, list[int]]:
    batch = SlotBatch(engine)
    batch.admit(Prompt(prompt), params)
    return batch, batch.read_prompt()[1].tokens.tolist()


def tokens_of(all_drawn) -> list[int]:
    return [int(drawn.tokens[0]) for drawn in all_drawn]


@pytest.mark.parametrize(("tokens", "guess"), [
    ([1, 2, 3, 4, 5, 9, 1, 2, 3], [4, 5, 9, 1]),
    ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], [5, 1, 2, 3]),  # the latest place
    ([1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3], [4, 8, 2, 3]),  # three tokens rather than two
    ([8, 2, 3, 5, 1, 2, 3], [5, 1, 2, 3]),
    ([1, 2, 5, 6, 7, 8, 1, 2, 1, 2], [5, 6, 7, 8]),  # not the one that nothing follows yet
    ([7] * 8, [7] * 4),
    ([7] * 4, [7]),
    ([1, 2, 3], []),
    ([1], []),
])  # fmt: skip
def test_a_guess_is_what_followed_the_same_tokens_before(tokens, guess):
    assert look_up(np.array(tokens), 4) == guess


@pytest.mark.parametrize("right", range(6))
def test_a_guess_is_kept_as_far_as_it_is_right(right):
    engine = varied_engine(slots=2)
    prompt, params = prompt_of(1, 30), SamplingParams(max_tokens=30)
    (alone,) = engine.generate([prompt], params)
    batch, first = begun(engine, prompt, params)
    guess = [*alone.tokens[1 : 1 + right], *[(token + 1) % 96 for token in alone.tokens[1 + right : 6]]]
    tokens = first + tokens_of(batch.step_along(guess))
    assert len(tokens) == 1 + right + 1
    assert engine.lengths[0] == len(prompt) + len(tokens) - 1
    while batch.decoding:
        tokens += batch.step().tokens.tolist()
    assert tokens == alone.tokens


def test_an_answer_ends_within_a_guess_with_its_stop_token_and_at_its_limit():
    engine = varied_engine(slots=2)
    prompt = prompt_of(1, 30)
    (alone,) = engine.generate([prompt], SamplingParams(max_tokens=9))
    stop = alone.tokens[4]
    batch, first = begun(engine, prompt, SamplingParams(max_tokens=9, stop=(stop,)))
    drawn = batch.step_along(alone.tokens[1:8])
    assert first + tokens_of(drawn) == alone.tokens[:5]
    assert (drawn[-1].stopped[0], drawn[-1].ended[0], batch.free) == (True, True, 2)
    batch, first = begun(engine, prompt, SamplingParams(max_tokens=9))
    drawn = batch.step_along(alone.tokens[1:8])
    assert first + tokens_of(drawn) == alone.tokens
    assert (drawn[-1].stopped[0], drawn[-1].ended[0], batch.free) == (False, True, 2)


@pytest.mark.parametrize(("network", "right", "pause_s"), [(small_engine, 0.6, 0.02), (varied_engine, 0, 0.002)])
def test_greedy_answers_are_the_same_with_guesses_and_without(network, right, pause_s, slowly):
    """Of a network that repeats itself, and of one whose guesses are nearly all wrong."""
    prompts = [prompt_of(seed, 40) for seed in range(4)]
    answers = network(slots=1).generate(prompts, LONG)
    slowly("decode", pause_s)
    scheduler = Scheduler(network(slots=2))
    for prompt, alone in zip(prompts, answers, strict=True):
        stream = scheduler.submit(prompt, LONG)
        assert list(stream) == alone.tokens
        np.testing.assert_allclose(stream.logprobs, alone.logprobs, atol=1e-4)
    scheduler.close()
    totals = scheduler.metrics().totals
    assert totals.completion_tokens == 4 * 200
    assert totals.draft_tokens > 0
    assert totals.accepted_tokens >= right * 800


def test_a_conversation_goes_on_from_an_answer_that_was_guessed(scheduler, slowly):
    """Wrong guesses are no part of what its slot holds."""
    slowly("decode", 0.002)
    prompt = prompt_of(1, 40)
    said = list(scheduler.submit(prompt, SamplingParams(max_tokens=50)))
    wait_for(lambda: scheduler.active == 0)
    following = [*prompt, *said, 1, 2, 3]
    stream = scheduler.submit(following, SamplingParams(max_tokens=20))
    (alone,) = small_engine(slots=1).generate([following], SamplingParams(max_tokens=20))
    assert list(stream) == alone.tokens
    assert stream.prompt.cached_tokens == 40 + 50 - 1


@pytest.mark.parametrize("seed", range(4))
def test_sampled_answers_are_the_same_with_guesses_and_without(seed, slowly):
    """At a temperature at which this network often says what it said, and not always."""
    params = replace(LONG, temperature=0.6, seed=seed)
    (alone,) = small_engine(slots=1).generate([prompt_of(seed, 40)], params)
    assert len(set(alone.tokens)) > 1
    slowly("decode", 0.005)
    batch, tokens = begun(small_engine(slots=2), prompt_of(seed, 40), params)
    drafts = Drafts(batch)
    while batch.decoding:
        tokens += tokens_of(drafts.step())
    assert tokens == alone.tokens
    assert 0 < drafts.accepted < drafts.drafted


def test_guesses_that_fail_for_sampled_answers_do_not_rest_for_greedy_ones(slowly):
    slowly("decode", 0.02)
    engine = small_engine(slots=2)
    batch = SlotBatch(engine)
    drafts = Drafts(batch)
    accepted = []
    for params in (replace(LONG, temperature=2.0, seed=1), LONG):
        batch.admit(Prompt(prompt_of(1, 40)), params)
        batch.read_prompt()
        before = drafts.accepted
        while batch.decoding:
            drafts.step()
        accepted.append(drafts.accepted - before)
    assert accepted[1] > 100 > accepted[0]


def test_answers_of_several_at_a_time_are_not_guessed():
    batch = SlotBatch(small_engine(slots=2))
    drafts = Drafts(batch)
    for sequence in range(2):
        batch.admit(Prompt(prompt_of(1, 40)), LONG, [sequence])
        batch.read_prompt()
    while batch.decoding:
        drafts.step()
    assert drafts.drafted == 0


def test_guesses_rest_where_they_cost_more_than_they_save(slowly):
    slowly("extend", 0.05)
    batch, _ = begun(small_engine(slots=2), prompt_of(1, 40), LONG)
    drafts, passes = Drafts(batch), []
    while batch.decoding:
        passes.append(len(drafts.step()))
    assert 0 < drafts.drafted <= 2 * 4 * 7  # two trials of four
    assert sum(passes) == 199


def test_guesses_that_rested_are_tried_again(slowly, monkeypatch):
    batch, _ = begun(small_engine(slots=2), prompt_of(1, 40), LONG)
    drafts = Drafts(batch)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "extend", lambda *given, extend=Engine.extend: (time.sleep(0.05), extend(*given))[1])
        while drafts.drafted == 0 or len(drafts.step()) > 1:
            drafts.step()
    slowly("decode", 0.002)
    resting = drafts.drafted
    while batch.decoding:
        drafts.step()
    assert drafts.drafted > resting + 4 * 7


def test_what_a_schema_forces_is_guessed_and_changes_nothing(slowly):
    """The keys of an object: their usual tokens, which are kept where the model prefers them to other ones."""
    slowly("decode", 0.002)
    tokenizer = small_tokenizer()
    grammar = Grammars(tokenizer).json_schema(SCHEMA)
    params = SamplingParams(max_tokens=300, stop=tokenizer.stop_ids, constraint=grammar)
    engine = test_structured.small_engine(tokenizer, slots=2)
    (alone,) = engine.generate([test_structured.PROMPT], params)
    batch, tokens = begun(engine, test_structured.PROMPT, params)
    drafts = Drafts(batch)
    while batch.decoding:
        tokens += tokens_of(drafts.step())
    assert tokens == alone.tokens
    assert drafts.drafted > 0
    state = grammar.start()
    for token in tokenizer.encode('{"evi'):
        state.accept(token)
    assert tokenizer.decode(state.forced()) == "dence"


def test_a_constraint_that_fails_within_a_guess_ends_the_answer_after_what_was_right():
    params = SamplingParams(max_tokens=30, constraint=test_structured.Fails(after=4))
    engine = small_engine(slots=2)
    batch, first = begun(engine, prompt_of(1, 30), params)
    drawn = batch.step_along(first * 6)  # this network says the same token ten times
    assert tokens_of(drawn) == first * 3
    with pytest.raises(ConstraintError, match="too complex"):
        batch.step_along(first * 6)
