"""Prompts that begin like earlier ones go on from their keys and values, and get the answers that they get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime as ort
import pytest
import torch
from served import DOMAIN, MODEL, make_store, small_tokenizer
from test_scheduler import CONFIG, Gate, prompt_of, varied_engine, wait_for

from twinloop.models.decoder import Decoder
from twinloop.serving.decisions import DecisionService
from twinloop.serving.engine import Engine
from twinloop.serving.engine.prefixes import SHORTEST
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler
from twinloop.serving.engine.slots import Prompt, SlotBatch
from twinloop.serving.model_manager import ModelManager

GREEDY = SamplingParams(max_tokens=12)
ONE = SamplingParams(max_tokens=1)
SYSTEM = prompt_of(1, 100)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(varied_engine(slots=3), queue_size=200, prefill_tokens=32)
    yield scheduler
    scheduler.close(drain=False, timeout_s=10)


@pytest.fixture(scope="module")
def alone() -> Callable[[list[int], int], list[int]]:
    """Greedy answers of an engine that reuses nothing."""
    engine = varied_engine(slots=1)
    return lambda prompt, max_tokens=12: engine.generate([prompt], SamplingParams(max_tokens=max_tokens))[0].tokens


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Lengths of the pieces of prompts that engines compute."""
    lengths: list[int] = []
    prefill = Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda self, slot, tokens, **at: (
        lengths.append(len(tokens)), prefill(self, slot, tokens, **at))[1])  # fmt: skip
    return lengths


def answer(scheduler: Scheduler, prompt: list[int], params: SamplingParams = GREEDY) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's were cached; once its slot is free again."""
    stream = scheduler.submit(prompt, params)
    tokens = list(stream)
    wait_for(lambda: scheduler.active == 0)
    return tokens, stream.prompt.cached_tokens


def test_a_repeated_beginning_is_computed_once(scheduler, computed, alone):
    first, second = [*SYSTEM, *prompt_of(2, 7)], [*SYSTEM, *prompt_of(3, 9)]
    assert answer(scheduler, first) == (alone(first), 0)
    computed.clear()
    assert answer(scheduler, second) == (alone(second), 100)
    assert computed[0] == 9
    totals = scheduler.metrics().totals
    assert (totals.prompt_tokens, totals.prefix_cache_queries, totals.prefix_cache_hits) == (216, 216, 100)


def test_the_last_token_of_the_same_prompt_is_computed_for_its_logits(scheduler, computed, alone):
    assert answer(scheduler, SYSTEM)[1] == 0
    computed.clear()
    assert answer(scheduler, SYSTEM) == (alone(SYSTEM), 99)
    assert computed[0] == 1


def test_a_conversation_goes_on_from_the_whole_of_its_last_answer(scheduler, alone):
    """But for the answer's last token, which was drawn and not read."""
    said = answer(scheduler, SYSTEM)[0]
    following = [*SYSTEM, *said, *prompt_of(2, 5)]
    assert answer(scheduler, following) == (alone(following), 100 + 12 - 1)


def test_prompts_that_arrive_together_share_their_beginning(scheduler, computed, alone):
    prompts = [[*SYSTEM, *prompt_of(seed, 6)] for seed in range(2, 10)]
    with scheduler._lock:
        streams = [scheduler.submit(prompt, GREEDY) for prompt in prompts]
    assert [list(stream) for stream in streams] == [alone(prompt) for prompt in prompts]
    assert [stream.prompt.cached_tokens for stream in streams] == [0] + [100] * 7


def test_the_logits_are_those_of_a_prompt_in_pieces():
    engine = varied_engine(slots=3)
    prompt = [*SYSTEM, *prompt_of(2, 9)]
    expected = engine.prefill(0, prompt).copy()
    batch = SlotBatch(engine)
    for tokens, cached in (([*SYSTEM, *prompt_of(3, 50)], 0), (prompt, 100)):
        admitted = Prompt(tokens)
        batch.admit_reusing(admitted, GREEDY)
        assert admitted.cached_tokens == cached
        batch.read_prompt()
        for _ in range(4):  # decoded beyond what the next one shares
            batch.step()
    np.testing.assert_allclose(admitted.logits_V, expected, atol=1e-4)


def test_an_answer_that_still_runs_is_copied_from_and_goes_on(scheduler, monkeypatch, alone):
    gate = Gate(monkeypatch)
    first, second = [*SYSTEM, *prompt_of(2, 7)], [*SYSTEM, *prompt_of(3, 9)]
    running = scheduler.submit(first, SamplingParams(max_tokens=60))
    tokens = iter(running)
    begin = next(tokens)
    later = scheduler.submit(second, GREEDY)
    gate.opened.set()
    assert list(later) == alone(second)
    assert later.prompt.cached_tokens == 100
    assert [begin, *tokens] == alone(first, 60)


def test_what_was_used_last_is_kept(scheduler):
    """Three slots: a fourth text displaces the one that nobody asked for the longest time."""
    texts = [prompt_of(seed, 60) for seed in range(4)]
    for text in texts[:3]:
        assert answer(scheduler, text, ONE)[1] == 0
    assert answer(scheduler, [*texts[0], 5], ONE)[1] == 60
    assert answer(scheduler, texts[3], ONE)[1] == 0
    assert [answer(scheduler, [*texts[index], 6], ONE)[1] for index in (0, 2, 3)] == [60, 60, 60]
    assert answer(scheduler, texts[1], ONE)[1] == 0


def test_as_many_conversations_as_slots_are_kept_whole(scheduler, alone):
    histories = [prompt_of(seed, 40) for seed in range(3)]
    for turn in range(3):
        for history in histories:
            tokens, cached = answer(scheduler, history)
            assert tokens == alone(history)
            assert cached == (len(history) - 4 if turn else 0)
            history += [*tokens, 1, 2, 3]


def test_the_same_prompt_again_and_again_displaces_nothing(scheduler):
    other = prompt_of(2, 60)
    answer(scheduler, other)
    for _ in range(5):
        answer(scheduler, SYSTEM)
    assert answer(scheduler, other)[1] == 59


def test_answers_take_the_lowest_slots_wherever_their_beginnings_are():
    """So a decode step has no more rows than without reuse."""
    batch = SlotBatch(varied_engine(slots=3))
    prompts = [[Prompt(prompt_of(seed, 40)) for seed in range(3)] for _ in range(2)]
    for prompt in prompts[0]:
        assert batch.admit_reusing(prompt, ONE) == [0]
        batch.read_prompt()
    assert [batch.admit_reusing(prompt, GREEDY) for prompt in prompts[1]] == [[0], [1], [2]]
    assert [[prompt.cached_tokens for prompt in each] for each in prompts] == [[0] * 3, [39] * 3]


def test_a_prompt_that_was_cancelled_halfway_is_reused_as_far_as_it_was_computed():
    batch = SlotBatch(varied_engine(slots=2))
    (slot,) = batch.admit_reusing(Prompt(SYSTEM), GREEDY)
    batch.read_prompt(40)
    batch.release(slot)
    batch.admit_reusing(Prompt(prompt_of(2, 9)), GREEDY)
    batch.read_prompt()
    batch.step()
    again = Prompt(SYSTEM)
    batch.admit_reusing(again, GREEDY)
    assert again.cached_tokens == 40
    assert batch.read_prompt()[0] == 60
    np.testing.assert_allclose(again.logits_V, varied_engine(slots=1).prefill(0, SYSTEM), atol=1e-4)


def test_a_piece_that_failed_is_not_taken_for_computed(scheduler, monkeypatch, alone):
    answer(scheduler, SYSTEM)
    run = ort.InferenceSession.run_with_iobinding
    with monkeypatch.context() as patch:

        def fails_after_it_wrote(session, binding):
            run(session, binding)
            raise RuntimeError("no luck")

        patch.setattr(ort.InferenceSession, "run_with_iobinding", fails_after_it_wrote)
        with pytest.raises(RuntimeError, match="no luck"):
            list(scheduler.submit([*SYSTEM[:50], *prompt_of(2, 20)], GREEDY))
    wait_for(lambda: scheduler.active == 0)
    assert answer(scheduler, SYSTEM)[0] == alone(SYSTEM)


def test_a_beginning_too_short_for_a_copy_is_computed(scheduler):
    answer(scheduler, SYSTEM, ONE)
    assert answer(scheduler, [*SYSTEM[: SHORTEST - 1], *prompt_of(2, 9)], ONE)[1] == 0
    assert answer(scheduler, [SYSTEM[0]], ONE)[1] == 0
    assert answer(scheduler, [*SYSTEM[:SHORTEST], *prompt_of(3, 9)], ONE)[1] == SHORTEST


def test_answers_under_any_traffic_are_those_without_reuse(scheduler, alone):
    """Beginnings of all lengths, with answers among them; some requests are given up in the middle."""
    random = np.random.default_rng(0)
    known = [prompt_of(seed, 120) for seed in range(4)]
    running = []
    for index in range(120):
        base = known[-random.integers(1, 5)]  # one of the last four
        prompt = [*base[: random.integers(1, len(base))], *prompt_of(100 + index, int(random.integers(1, 30)))]
        stream = scheduler.submit(prompt, SamplingParams(max_tokens=int(random.integers(1, 13))))
        if index % 7 == 0:
            stream.cancel()
        running.append((prompt, stream))
        if index % 10 == 9:  # three slots at work, seven prompts waiting
            for prompt, stream in running:
                tokens = list(stream)
                assert stream.finish_reason == "cancelled" or tokens == alone(prompt, stream.params.max_tokens)
                known.append([*prompt, *tokens][:200])
            running.clear()
    totals = scheduler.metrics().totals
    assert totals.prefix_cache_hits > totals.prefix_cache_queries / 5


@pytest.mark.parametrize("length", [SHORTEST - 9, 100])
def test_the_answers_of_one_request_share_their_prompt_beside_what_slots_hold(scheduler, computed, length):
    """Also those that get a slot only when the first ones have ended: the prompt is looked up and counted once."""
    prompt, params = prompt_of(7, length), SamplingParams(max_tokens=9, temperature=1.0, seed=4)
    alone = [answer.tokens for answer in varied_engine(slots=1).generate([prompt], params, group=7)]
    half = length // 2 if length > 2 * SHORTEST else 0
    answer(scheduler, [*prompt[: length // 2], *prompt_of(2, 9)])
    before = scheduler.metrics().totals
    computed.clear()
    with scheduler.reserve(7) as place:
        streams = place.submit(prompt, params)
    assert [list(stream) for stream in streams] == alone
    assert sum(computed) == length - half
    wait_for(lambda: scheduler.active == 0)
    after = scheduler.metrics().totals
    assert after.prompt_tokens - before.prompt_tokens == length
    assert after.prefix_cache_queries - before.prefix_cache_queries == length
    assert after.prefix_cache_hits - before.prefix_cache_hits == half == streams[0].prompt.cached_tokens


def test_several_answers_to_the_same_prompt_again_and_again_displace_nothing(scheduler):
    other = prompt_of(2, 60)
    answer(scheduler, other)
    for _ in range(4):
        with scheduler.reserve(2) as place:
            for stream in place.submit(SYSTEM, GREEDY):
                list(stream)
        wait_for(lambda: scheduler.active == 0)
    assert answer(scheduler, other)[1] == 59


def test_layers_with_windows_reuse_too():
    """Their slots hold every position, not the window's alone."""
    config = CONFIG.model_copy(update={"windows": (8, None)})
    torch.manual_seed(0)
    network = Decoder(config).requires_grad_(False)
    weights = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in network.state_dict().items()}
    engine = Engine.from_weights(config, weights, max_length=256, slots=2)
    prompt = [*SYSTEM[:60], *prompt_of(2, 5)]
    expected = engine.prefill(0, prompt).copy()
    batch = SlotBatch(engine)
    batch.admit_reusing(Prompt(SYSTEM), GREEDY)
    batch.read_prompt()
    batch.step()
    admitted = Prompt(prompt)
    assert batch.admit_reusing(admitted, GREEDY) == [1]
    assert admitted.cached_tokens == 60
    batch.read_prompt()
    np.testing.assert_allclose(admitted.logits_V, expected, atol=1e-4)


def test_rollouts_reuse_nothing(computed):
    """Their result is a function of weights and arguments, bit for bit, whatever was served before."""
    prompts = [[*SYSTEM, *prompt_of(seed, 6)] for seed in (2, 3)]
    expected = varied_engine(slots=3).generate(prompts, GREEDY)
    engine = varied_engine(slots=3)
    scheduler = Scheduler(engine)
    for prompt in prompts:
        list(scheduler.submit(prompt, GREEDY))
    scheduler.close()
    computed.clear()
    assert engine.generate(prompts, GREEDY) == expected
    assert computed == [106, 106]


def test_the_next_model_begins_with_nothing(tmp_path):
    documents, tokenizer = make_store(tmp_path), small_tokenizer()

    def service() -> DecisionService:
        return DecisionService(Scheduler(varied_engine(slots=2)), tokenizer, documents, MODEL, DOMAIN)

    def cached() -> int:
        stream = manager.submit(lambda service: service.scheduler.submit(SYSTEM, GREEDY))
        list(stream)
        return stream.prompt.cached_tokens

    manager = ModelManager(service())
    assert [cached(), cached()] == [0, 99]
    manager.replace(service())
    assert [cached(), cached()] == [0, 99]
    assert manager.totals().prefix_cache_hits == 2 * 99
    manager.service.scheduler.close()


@pytest.mark.parametrize("shared", [True, False])
def test_prompts_that_are_cached_do_not_hold_up_a_running_answer(monkeypatch, shared):
    """As those that are computed do not: so many passes at most come between two of its tokens."""
    calls: list[str] = []
    for name in ("prefill", "decode"):
        work = getattr(Engine, name)
        monkeypatch.setattr(Engine, name, lambda *a, name=name, work=work, **k: (calls.append(name), work(*a, **k))[1])
    scheduler = Scheduler(varied_engine(slots=4), queue_size=60, prefill_tokens=2 * SHORTEST, draft_tokens=0)
    list(scheduler.submit(SYSTEM, ONE))
    running = scheduler.submit([1, 2, 3], SamplingParams(max_tokens=200))
    next(iter(running))
    calls.clear()
    others = [scheduler.submit([*(SYSTEM if shared else prompt_of(seed, 3)), seed], ONE) for seed in range(50)]
    for stream in others:
        list(stream)
    scheduler.close(drain=False, timeout_s=10)
    between = "".join(name[0] for name in calls).split("d")
    assert max(map(len, between)) <= 2
