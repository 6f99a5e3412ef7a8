"""The core of the slots: prompts read in pieces, sequences that are released early, copies and moves between slots."""

from __future__ import annotations

import pytest
from test_scheduler import MAX_LENGTH, prompt_of, small_engine

from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.slots import Prompt, SlotBatch

PARAMS = SamplingParams(max_tokens=6, temperature=1.0, seed=2)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return small_engine(slots=3)


def run(batch: SlotBatch) -> dict[int, list[int]]:
    """Read every prompt in pieces of 8, a step between two of them, to the end. Tokens by sequence."""
    answers: dict[int, list[int]] = {}
    while batch.reading or batch.decoding:
        all_drawn = [batch.read_prompt(8)[1] if batch.reading else None]
        all_drawn.append(batch.step() if batch.decoding else None)
        for drawn in filter(None, all_drawn):
            for sequence, token in zip(drawn.sequences.tolist(), drawn.tokens.tolist(), strict=True):
                answers.setdefault(sequence, []).append(token)
    return answers


def expected(engine: Engine, prompt: list[int], group: int) -> dict[int, list[int]]:
    return dict(enumerate(completion.tokens for completion in engine.generate([prompt], PARAMS, group=group)))


def test_a_group_continues_when_the_slot_that_reads_its_prompt_is_released(engine):
    prompt = prompt_of(1, 30)
    answers = expected(engine, prompt, 3)
    batch = SlotBatch(engine)
    slots = batch.admit(Prompt(prompt), PARAMS, [0, 1, 2])
    assert batch.read_prompt(8)[:2] == (8, None)
    batch.release(slots[0])
    assert batch.free == 1
    del answers[0]
    assert run(batch) == answers
    assert batch.free == 3


def test_a_released_prompt_leaves_the_one_after_it_alone(engine):
    second = prompt_of(2, 20)
    answers = expected(engine, second, 1)
    batch = SlotBatch(engine)
    slots = batch.admit(Prompt(prompt_of(1, 30)), PARAMS, [1, 2])
    batch.admit(Prompt(second), PARAMS, [0])
    for slot in slots:
        batch.release(slot)
    assert run(batch) == answers


def test_a_prompt_is_copied_while_a_slot_begins_with_it_and_computed_again_otherwise(engine):
    tokens = prompt_of(4, 24)
    answers = expected(engine, tokens, 6)
    batch, prompt = SlotBatch(engine), Prompt(tokens)
    batch.admit(prompt, PARAMS, [0, 1])
    assert run(batch) == {sequence: answers[sequence] for sequence in (0, 1)}
    batch.admit(prompt, PARAMS, [2])
    count, drawn, _ = batch.read_prompt(8)
    assert (count, drawn is None) == (0, False)
    assert [drawn.tokens[0], *run(batch)[2]] == answers[2]
    batch.admit(Prompt(prompt_of(5, 9)), PARAMS, [3, 4, 5])  # takes all slots
    run(batch)
    batch.admit(prompt, PARAMS, [4, 5])
    assert batch.read_prompt(8)[:2] == (8, None)
    assert run(batch) == {sequence: answers[sequence] for sequence in (4, 5)}


def test_compacted_slots_change_no_answer(engine):
    prompts = [prompt_of(seed, 12) for seed in range(3)]
    alone = [engine.generate([prompt], PARAMS, first_sequence=at)[0].tokens for at, prompt in enumerate(prompts)]
    batch = SlotBatch(engine)
    slots = [batch.admit(Prompt(prompt), PARAMS, [at])[0] for at, prompt in enumerate(prompts)]
    first_tokens = [batch.read_prompt()[1].tokens[0] for _ in prompts]
    batch.release(slots[0])
    batch.compact_slots()
    assert batch.decoding == [0, 1]
    answers = run(batch)
    assert {at: [first_tokens[at], *answers[at]] for at in answers} == {1: alone[1], 2: alone[2]}


def test_an_answer_ends_when_its_slot_is_full(engine):
    batch = SlotBatch(engine)
    batch.admit(Prompt(prompt_of(1, MAX_LENGTH - 3)), PARAMS)
    assert len(run(batch)[0]) == 3


def test_sequences_that_come_while_their_prompt_is_read_wait_for_it(engine):
    tokens = prompt_of(6, 30)
    answers = expected(engine, tokens, 3)
    batch, prompt = SlotBatch(engine), Prompt(tokens)
    batch.admit(prompt, PARAMS, [0])
    assert batch.read_prompt(8)[:2] == (8, None)
    batch.admit(prompt, PARAMS, [1, 2])
    assert [batch.read_prompt(8)[0] for _ in range(2)] == [8, 8]
    count, drawn, _ = batch.read_prompt(8)
    assert (count, drawn.sequences.tolist()) == (6, [0, 1, 2])
    later = run(batch)
    assert {at: [token, *later[at]] for at, token in enumerate(drawn.tokens.tolist())} == answers


def test_a_slot_that_was_released_before_its_prompt_was_whole_is_not_copied_from(engine):
    tokens = prompt_of(7, 20)
    answers = expected(engine, tokens, 3)
    batch, prompt = SlotBatch(engine), Prompt(tokens)
    slots = batch.admit(prompt, PARAMS, [0, 1])
    batch.read_prompt(8)
    batch.release(slots[1])
    run(batch)
    batch.admit(Prompt(prompt_of(8, 5)), PARAMS)  # takes the slot that has the whole prompt
    batch.admit(prompt, PARAMS, [2])
    assert run(batch)[2] == answers[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"min_p": 0.05, "top_p": 0.9},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {3: 4.0}},
    ],
    ids=["top_k", "min_p", "penalties"],
)
def test_a_seed_gives_the_same_answer_in_any_slot_beside_any_others(engine, settings):
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, **settings)
    prompts = [prompt_of(seed, 9) for seed in range(3)]
    alone = {at: engine.generate([each], params, first_sequence=at)[0].tokens for at, each in enumerate(prompts)}
    batch = SlotBatch(engine)
    batch.admit(Prompt(prompts[0]), SamplingParams(max_tokens=3, temperature=0.5, seed=1), [7])
    slots = [batch.admit(Prompt(prompts[at]), params, [at])[0] for at in (1, 2)]
    assert slots == [1, 2]
    answers = run(batch)
    assert {at: answers[at] for at in (1, 2)} == {at: alone[at] for at in (1, 2)}
    together = engine.generate(prompts, params)
    assert {at: completion.tokens for at, completion in enumerate(together)} == alone
    plain = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=1.0, seed=5))
    assert {at: completion.tokens for at, completion in enumerate(plain)} != alone
