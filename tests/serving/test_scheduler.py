"""Many callers of one engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import onnxruntime as ort
import pytest
import torch

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import EngineDiedError, QueueFullError, Scheduler, SchedulerClosedError

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
MAX_LENGTH = 256


def small_engine(slots: int) -> Engine:
    torch.manual_seed(0)
    network = Decoder(CONFIG).requires_grad_(False)
    network.model.embed_tokens.weight.mul_(10)
    weights = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in network.state_dict().items()}
    return Engine.from_weights(CONFIG, weights, max_length=MAX_LENGTH, slots=slots)


def varied_engine(slots: int) -> Engine:
    """A network whose greedy answers hang on every token before, and do not repeat themselves."""
    config = CONFIG.model_copy(update={"tie_word_embeddings": False})
    torch.manual_seed(0)
    network = Decoder(config).requires_grad_(False)
    for name, weight in network.named_parameters():
        if "norm" not in name:
            weight.mul_(3)
    weights = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in network.state_dict().items()}
    return Engine.from_weights(config, weights, max_length=MAX_LENGTH, slots=slots)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(small_engine(slots=3), queue_size=40, prefill_tokens=8)
    yield scheduler
    scheduler.close(drain=False, timeout_s=10)


def prompt_of(seed: int, length: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.vocab_size, length or int(rng.integers(1, 40))).tolist()


def wait_for(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


class Gate:
    """Holds every decode step of an engine until it is opened, so that tests decide what runs together."""

    def __init__(self, monkeypatch):
        self.opened = threading.Event()
        decode = Engine.decode

        def gated(engine, *arguments):
            self.opened.wait(10)
            return decode(engine, *arguments)

        monkeypatch.setattr(Engine, "decode", gated)


def test_concurrent_answers_equal_those_of_the_engine_alone(scheduler):
    prompts = [prompt_of(seed) for seed in range(24)]
    answers: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=index, stop=(7,))
        answers[index] = list(scheduler.submit(prompts[index], params))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    engine = small_engine(slots=1)
    for index, prompt in enumerate(prompts):
        alone = engine.generate([prompt], SamplingParams(max_tokens=20, temperature=1.0, seed=index, stop=(7,)))[0]
        assert answers[index] == alone.tokens
    totals = scheduler.metrics().totals
    assert totals.finished == 24
    assert totals.prompt_tokens == sum(map(len, prompts))
    assert totals.completion_tokens == sum(map(len, answers.values()))


@pytest.mark.parametrize("params", [
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=40, temperature=0.8, seed=3, stop=(7, 8, 9)),
    SamplingParams(max_tokens=40, temperature=1.5, top_p=0.6, seed=4),
])  # fmt: skip
def test_an_answer_is_that_of_generate_bit_for_bit(params):
    """Token by token; with drafts, which are computed several at a time, up to rounding (`test_drafts.py`)."""
    prompt = prompt_of(3, 8)
    (alone,) = small_engine(slots=3).generate([prompt], params)
    scheduler = Scheduler(small_engine(slots=3), draft_tokens=0)
    stream = scheduler.submit(prompt, params)
    assert list(stream) == alone.tokens
    assert (stream.logprobs, stream.finish_reason) == (alone.logprobs, alone.finish_reason)
    scheduler.close()


def test_greedy_and_cut_requests_share_a_step(scheduler):
    greedy = scheduler.submit(prompt_of(1), SamplingParams(max_tokens=30))
    narrow = scheduler.submit(prompt_of(2), SamplingParams(max_tokens=30, temperature=1.0, top_p=1e-6))
    engine = small_engine(slots=1)
    assert list(greedy) == engine.generate([prompt_of(1)], SamplingParams(max_tokens=30))[0].tokens
    assert list(narrow) == engine.generate([prompt_of(2)], SamplingParams(max_tokens=30))[0].tokens


def test_an_answer_says_why_it_ended_and_how_long_it_took(scheduler):
    stream = scheduler.submit(prompt_of(1), SamplingParams(max_tokens=5))
    assert len(list(stream)) == 5
    assert stream.finish_reason == "length"
    assert len(stream.logprobs) == 5
    timings = stream.timings
    assert 0 <= timings.queue_s <= timings.ttft_s <= timings.total_s
    assert len(timings.token_s) == 4
    assert list(stream) == []


def test_an_answer_ends_where_its_slot_does(scheduler):
    stream = scheduler.submit(prompt_of(1, MAX_LENGTH - 3), SamplingParams(max_tokens=100))
    assert len(list(stream)) == 3
    assert stream.finish_reason == "length"


def test_a_long_prompt_is_read_between_the_steps_of_others(scheduler, monkeypatch):
    """With 8 prompt tokens a round, 160 of them take 20 rounds, in each of which the running answer goes on."""
    gate = Gate(monkeypatch)
    running = scheduler.submit(prompt_of(1, 3), SamplingParams(max_tokens=100))
    tokens = iter(running)
    next(tokens)
    late = scheduler.submit(prompt_of(2, 160), SamplingParams(max_tokens=1))
    gate.opened.set()
    assert len(list(late)) == 1
    assert len(running.logprobs) >= 19
    assert len(list(tokens)) == 99


def test_a_cancelled_answer_frees_its_slot(scheduler, monkeypatch):
    gate = Gate(monkeypatch)
    with scheduler.reserve(5) as place:  # of one prompt: three get their slots at once, before the first step
        streams = place.submit(prompt_of(0, 3), SamplingParams(max_tokens=200))
    wait_for(lambda: scheduler.active == 3 and scheduler.queued == 2)
    streams[0].cancel()
    streams[3].cancel()
    gate.opened.set()
    assert list(streams[3]) == []
    assert len(list(streams[0])) < 200
    assert {streams[0].finish_reason, streams[3].finish_reason} == {"cancelled"}
    assert [len(list(streams[index])) for index in (1, 2, 4)] == [200, 200, 200]
    assert scheduler.metrics().totals.cancelled == 2
    streams[1].cancel()


def test_a_full_queue_refuses_and_recovers(monkeypatch):
    gate = Gate(monkeypatch)
    scheduler = Scheduler(small_engine(slots=1), queue_size=2)
    params = SamplingParams(max_tokens=3)
    streams = [scheduler.submit([1, 2], params) for _ in range(scheduler.capacity)]
    with pytest.raises(QueueFullError, match="try again"):
        scheduler.submit([1, 2], params)
    gate.opened.set()
    assert [len(list(stream)) for stream in streams] == [3, 3, 3]
    assert len(list(scheduler.submit([1, 2], params))) == 3
    scheduler.close()


def test_a_wrong_prompt_is_refused_before_it_queues(scheduler):
    for prompt in ([], [1] * MAX_LENGTH, [CONFIG.vocab_size]):
        with pytest.raises(UserError, match="prompt"):
            scheduler.submit(prompt, SamplingParams())
    assert scheduler.queued == scheduler.active == 0


def test_an_error_in_one_prompt_leaves_the_others_alone(scheduler, monkeypatch):
    prefill = Engine.prefill

    def fails_on_13(engine, slot, tokens, **arguments):
        if 13 in tokens:
            raise RuntimeError("no luck")
        return prefill(engine, slot, tokens, **arguments)

    monkeypatch.setattr(Engine, "prefill", fails_on_13)
    good = scheduler.submit([1, 2], SamplingParams(max_tokens=50))
    bad = scheduler.submit([13], SamplingParams())
    with pytest.raises(RuntimeError, match="no luck"):
        list(bad)
    assert bad.finish_reason == "error"
    assert len(list(good)) == 50
    totals = scheduler.metrics().totals
    assert (totals.failed, totals.finished) == (1, 1)


def test_sampling_that_cannot_begin_ends_its_answers_and_nothing_else(scheduler):
    good = scheduler.submit([1, 2], SamplingParams(max_tokens=50))
    with scheduler.reserve(2) as place:
        streams = place.submit([3], SamplingParams(stop=(CONFIG.vocab_size,)))  # no token's id
    for stream in streams:
        with pytest.raises(IndexError):
            list(stream)
    assert len(list(good)) == 50
    assert scheduler.running
    assert [len(list(scheduler.submit([seed], SamplingParams(max_tokens=5)))) for seed in range(4)] == [5] * 4
    wait_for(lambda: scheduler.active == 0)
    totals = scheduler.metrics().totals
    assert (totals.failed, totals.finished) == (2, 5)


def test_a_failed_step_ends_its_answers_and_nothing_else(scheduler, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("no luck")))
        with pytest.raises(RuntimeError, match="no luck"):
            list(scheduler.submit([1, 2], SamplingParams(max_tokens=9)))
    assert scheduler.running
    assert len(list(scheduler.submit([1, 2], SamplingParams(max_tokens=9)))) == 9


def test_an_error_outside_of_any_answer_ends_all_and_is_said(monkeypatch):
    deaths, gate = [], Gate(monkeypatch)
    scheduler = Scheduler(small_engine(slots=1), on_death=lambda: deaths.append(scheduler.died))
    streams = [scheduler.submit([1, 2], SamplingParams(max_tokens=9)) for _ in range(3)]
    monkeypatch.setattr(scheduler, "_end_for_readers", lambda: (_ for _ in ()).throw(MemoryError))
    gate.opened.set()
    for stream in streams:
        with pytest.raises(MemoryError):
            list(stream)
    wait_for(lambda: deaths == [True])
    assert not scheduler.running
    with pytest.raises(EngineDiedError):
        scheduler.reserve()
    assert not scheduler.full
    scheduler.close()


def test_closing_completes_what_was_accepted_and_takes_no_more():
    scheduler = Scheduler(small_engine(slots=2))
    streams = [scheduler.submit(prompt_of(seed), SamplingParams(max_tokens=20)) for seed in range(6)]
    scheduler.close()
    assert [len(list(stream)) for stream in streams] == [20] * 6
    assert not scheduler.running
    with pytest.raises(SchedulerClosedError):
        scheduler.submit([1], SamplingParams())


def test_closing_at_once_ends_every_stream():
    scheduler = Scheduler(small_engine(slots=1))
    streams = [scheduler.submit(prompt_of(seed, 3), SamplingParams(max_tokens=250)) for seed in range(4)]
    scheduler.close(drain=False, timeout_s=5)
    assert all(len(list(stream)) < 250 and stream.finish_reason == "cancelled" for stream in streams)


def test_the_rate_of_tokens_is_measured(scheduler):
    list(scheduler.submit([1, 2], SamplingParams(max_tokens=100)))
    metrics = scheduler.metrics()
    assert metrics.totals.completion_tokens == 100
    assert metrics.tokens_per_s > 0
    assert (metrics.queued, metrics.active, metrics.slots) == (0, 0, 3)


@pytest.mark.parametrize("count", [3, 7])
def test_the_answers_of_one_request_share_its_prompt(scheduler, count):
    prompt, params = prompt_of(3, 30), SamplingParams(max_tokens=9, temperature=1.0, seed=4)
    alone = [answer.tokens for answer in small_engine(slots=1).generate([prompt], params, group=count)]
    before = scheduler.metrics().totals.prompt_tokens
    others = [scheduler.submit(prompt_of(seed, 5), SamplingParams(max_tokens=20)) for seed in range(2)]
    with scheduler.reserve(count) as place:
        streams = place.submit(prompt, params)
    assert [list(stream) for stream in streams] == alone
    assert all(list(stream) for stream in others)
    wait_for(lambda: scheduler.active == 0)
    assert scheduler.metrics().totals.prompt_tokens - before == 30 + 2 * 5
    with pytest.raises(QueueFullError), scheduler.reserve(scheduler.capacity + 1):
        pass
