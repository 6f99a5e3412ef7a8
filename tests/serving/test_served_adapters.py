"""Adapters beside the weights of one engine: in a mixed batch each answers as it does alone, and as merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from adapted import ADAPTERS, CONFIG, MAX_LENGTH, Exports, random_adapter
from engine_memory import held_bytes
from test_scheduler import Gate, wait_for

from twinloop.common.errors import UserError
from twinloop.models.exported import describe_exported, read_exported
from twinloop.models.memory import serving_memory
from twinloop.serving.engine import Engine
from twinloop.serving.engine.adapters import BASE, LoadedAdapter
from twinloop.serving.engine.held_adapters import AdapterDroppedError
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.scheduler import Scheduler, SchedulerClosedError
from twinloop.serving.engine.slots import Prompt, SlotBatch
from twinloop.serving.engine.stream import Stream

GREEDY = SamplingParams(max_tokens=20)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 60).tolist()
PROMPTS = [TOKENS[:20], TOKENS[5:12], TOKENS[3:40], TOKENS[:20], TOKENS[30:33], TOKENS[:20]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("adapted"))


def loaded_engine(exports: Exports, slots: int, precision: str = "fp32") -> tuple[Engine, list[LoadedAdapter]]:
    """An engine whose own adapter is `four`; the base, its own, and all others."""
    engine = Engine.load(exports.exported("four", ADAPTERS["four"], precision), slots=slots, threads=1)
    others = [engine.load_adapter(name, adapter) for name, adapter in ADAPTERS.items() if name != "four"]
    return engine, [BASE, engine.own, *others]


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_beside_the_base_are_those_of_the_merged_model(exports: Exports, name: str) -> None:
    merged = Engine.load(exports.exported(name, ADAPTERS[name], adapters=False), slots=1)
    alone = Engine.load(exports.exported(name, ADAPTERS[name]), slots=1)
    engine, adapters = loaded_engine(exports, slots=2)
    expected = merged.score(TOKENS)
    adapter = {each.name: each for each in adapters[2:]}.get(name, engine.own)
    np.testing.assert_allclose(alone.score(TOKENS), expected, atol=1e-4)
    np.testing.assert_allclose(engine.score(TOKENS, adapter=adapter), expected, atol=1e-4)
    assert np.abs(engine.score(TOKENS, adapter=BASE) - expected).max() > 0.5


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_answers_of_a_mixed_batch_are_those_of_each_adapter_alone(exports: Exports, precision: str) -> None:
    engine, adapters = loaded_engine(exports, slots=len(PROMPTS), precision=precision)
    chosen = [adapters[index % len(adapters)] for index in range(len(PROMPTS))]
    batch, answers = SlotBatch(engine), [list[int]() for _ in PROMPTS]
    for index, (prompt, adapter) in enumerate(zip(PROMPTS, chosen, strict=True)):
        batch.admit_reusing(Prompt(prompt, adapter), GREEDY, [index])
        drawn = batch.read_prompt()[1]
        answers[index] += drawn.tokens.tolist()
    while batch.decoding:
        drawn = batch.step()
        for sequence, token in zip(drawn.sequences.tolist(), drawn.tokens.tolist(), strict=True):
            answers[sequence].append(token)
    single, again = loaded_engine(exports, slots=1, precision=precision)
    for index, prompt in enumerate(PROMPTS):
        adapter = again[adapters.index(chosen[index])]
        assert answers[index] == single.generate([prompt], GREEDY, adapter=adapter)[0].tokens
    assert answers[0] == answers[5] != answers[3]  # one prompt: of the base, of the base, and of an adapter


def test_a_row_without_adapter_gets_the_very_logits_of_the_weights(exports: Exports) -> None:
    engine, adapters = loaded_engine(exports, slots=3)
    bare = Engine.load(exports.exported("four", ADAPTERS["four"]), slots=3)
    tokens = np.array([5, 6, 7])
    for each, used in ((engine, (adapters[2], BASE, adapters[4])), (bare, (BASE, BASE, BASE))):
        for slot, adapter in enumerate(used):
            each.hold([slot], 0, adapter)
            each.prefill(slot, TOKENS[:9])
    mixed = engine.decode(0, tokens, np.ones(3, bool))
    alone = bare.decode(0, tokens, np.ones(3, bool))
    np.testing.assert_array_equal(mixed[1], alone[1])
    assert np.abs(mixed[0] - alone[0]).max() > 0.1


def test_a_dropped_adapter_changes_no_other_and_its_memory_is_free(exports: Exports) -> None:
    engine, (_, own, nine, *_) = loaded_engine(exports, slots=2)
    before, held = engine.score(TOKENS, adapter=nine), held_bytes(engine)
    kept = engine.score(TOKENS, adapter=own)
    extra = engine.load_adapter("extra", random_adapter(9, 5))
    engine.drop_adapter(nine)
    np.testing.assert_array_equal(engine.score(TOKENS, adapter=own), kept)
    again = engine.load_adapter("nine", ADAPTERS["nine"])
    engine.drop_adapter(extra)
    np.testing.assert_array_equal(engine.score(TOKENS, adapter=again), before)
    assert held_bytes(engine) == held
    assert again.number != nine.number


def test_a_prompt_does_not_go_on_from_what_another_adapter_computed(exports: Exports) -> None:
    engine, (_, own, nine, *_) = loaded_engine(exports, slots=3)
    batch, prompt = SlotBatch(engine), TOKENS[:40]

    def cached(adapter: LoadedAdapter | None) -> int:
        asked = Prompt(prompt, adapter)
        (slot,) = batch.admit_reusing(asked, SamplingParams(max_tokens=1))
        drawn = batch.read_prompt()[1]
        single = Engine.load(exports.exported("four", ADAPTERS["four"]), slots=1)
        fresh = single.load_adapter("nine", ADAPTERS["nine"]) if adapter is nine else single.own
        assert drawn.tokens.tolist() == single.generate([prompt], SamplingParams(max_tokens=1), adapter=fresh)[0].tokens
        assert engine.adapters_C[slot] == (adapter or own).number
        return asked.cached_tokens

    assert [cached(None), cached(nine), cached(nine), cached(own), cached(nine)] == [0, 0, 39, 39, 39]
    engine.drop_adapter(nine)
    nine = engine.load_adapter("nine", ADAPTERS["nine"])
    assert cached(nine) == 0


def test_an_adapter_for_which_there_is_no_memory_is_refused_and_the_others_go_on(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = loaded_engine(exports, slots=1)
    before = engine.score(TOKENS)
    monkeypatch.setattr("twinloop.serving.engine.adapters.available_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"adapter big \(rank 64\) needs 0\.\d MiB of memory, and 0\.0 MiB are"):
        engine.load_adapter("big", random_adapter(5, 64))
    np.testing.assert_array_equal(engine.score(TOKENS), before)


@pytest.mark.parametrize("copies", [1, 3])
def test_the_own_adapter_of_every_process_must_fit_into_memory(
    exports: Exports, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    exported = exports.exported("nine", ADAPTERS["nine"])
    plain, plan = (
        serving_memory(CONFIG, precision="fp32", slots=1, max_length=MAX_LENGTH, adapter_ranks=ranks)
        for ranks in (0, 9)
    )
    engine = Engine.load(exported, slots=1)
    held = held_bytes(engine)
    engine.load_adapter("another", ADAPTERS["nine"])
    assert plan.total_bytes - plain.total_bytes == held_bytes(engine) - held > 0
    available = copies * plan.total_bytes
    monkeypatch.setattr("twinloop.serving.engine.runner.available_bytes", lambda: available)
    Engine.load(exported, slots=1, copies=copies)
    available -= 1
    with pytest.raises(UserError, match="MiB are available; take"):
        Engine.load(exported, slots=1, copies=copies)


def test_a_merged_export_takes_no_adapters_and_says_how_to_make_one_that_does(exports: Exports) -> None:
    merged = exports.exported("four", ADAPTERS["four"], adapters=False)
    with pytest.raises(UserError, match=r"takes no adapters; export one with `export: \{adapters: true\}`"):
        Engine.load(merged, slots=1).load_adapter("nine", ADAPTERS["nine"])


def test_exports_of_adapters_on_one_base_have_the_same_graph_and_weights(exports: Exports) -> None:
    four, nine = (exports.exported(name, ADAPTERS[name]) for name in ("four", "nine"))
    ours, theirs = describe_exported(four), describe_exported(nine)
    assert ours.has_base_of(theirs)
    assert ours.files["adapter/adapter_model.safetensors"] != theirs.files["adapter/adapter_model.safetensors"]
    for other in (
        exports.exported("four", ADAPTERS["four"], adapters=False),
        exports.exported("four", ADAPTERS["four"], "int8"),
    ):
        assert not ours.has_base_of(describe_exported(other))


def test_a_changed_byte_of_the_adapter_is_found(exports: Exports, tmp_path: Path) -> None:
    broken = Exports(tmp_path).exported("four", ADAPTERS["four"])
    path = broken / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors differs from its digest"):
        read_exported(broken)


def test_a_model_without_adapter_and_a_precision_of_cuda_are_refused(exports: Exports, tmp_path: Path) -> None:
    from twinloop.models.exported import export_model

    model = exports.adapted("four", ADAPTERS["four"])
    for source, precision, message in ((model / "base", "fp32", "has no adapter"), (model, "bf16", "not bf16")):
        with pytest.raises(UserError, match=message):
            export_model(source, tmp_path / "out", precision=precision, max_length=64, adapters=True)


@pytest.fixture
def served(exports: Exports) -> Iterator[tuple[Scheduler, dict[str, LoadedAdapter | None]]]:
    """A scheduler whose model's own adapter is `four`; the adapters of requests, by name."""
    engine = Engine.load(exports.exported("four", ADAPTERS["four"]), slots=3, threads=1)
    scheduler = Scheduler(engine, queue_size=60, prefill_tokens=16)
    others = {name: scheduler.adapters.load(name, each) for name, each in ADAPTERS.items() if name != "four"}
    yield scheduler, {"four": None, **others}
    scheduler.close(drain=False, timeout_s=10)


@pytest.fixture(scope="module")
def alone(exports: Exports) -> Callable[[str, list[int], int], list[int]]:
    """Greedy answers of each adapter on an engine of its own."""
    engines = {
        name: Engine.load(exports.exported(name, adapter), slots=1, threads=1) for name, adapter in ADAPTERS.items()
    }
    return lambda name, prompt, most: engines[name].generate([prompt], SamplingParams(max_tokens=most))[0].tokens


def ask(scheduler: Scheduler, adapter: LoadedAdapter | None, prompt: list[int], most: int) -> Stream:
    with scheduler.reserve() as place:
        place.use(adapter)
        (stream,) = place.submit(prompt, SamplingParams(max_tokens=most))
    return stream


def test_requests_for_several_adapters_at_once_are_answered_as_each_alone(served, alone) -> None:
    scheduler, adapters = served
    random = np.random.default_rng(3)
    asked = []
    for number in range(24):
        name, begin = list(adapters)[number % 4], int(random.integers(0, 20))
        prompt, most = TOKENS[begin : begin + int(random.integers(18, 40))], int(random.integers(1, 30))
        asked.append((name, prompt, most, ask(scheduler, adapters[name], prompt, most)))
    for name, prompt, most, stream in asked:
        assert list(stream) == alone(name, prompt, most)
    assert scheduler.metrics().totals.prefix_cache_hits > 0


def test_a_stream_of_an_adapter_that_is_dropped_goes_on_to_its_end(served, alone, monkeypatch) -> None:
    scheduler, adapters = served
    gate = Gate(monkeypatch)
    held = held_bytes(scheduler._engine)
    streams = [ask(scheduler, adapters["nine"], TOKENS[:30], 80) for _ in range(2)]
    scheduler.adapters.drop(adapters["nine"])
    with scheduler.reserve() as place, pytest.raises(AdapterDroppedError):
        place.use(adapters["nine"])
    assert adapters["nine"] not in scheduler.adapters.held
    other = ask(scheduler, adapters["one"], TOKENS[:30], 80)
    gate.opened.set()
    assert [list(stream) for stream in streams] == [alone("nine", TOKENS[:30], 80)] * 2
    assert list(other) == alone("one", TOKENS[:30], 80)
    wait_for(lambda: held_bytes(scheduler._engine) < held)
    assert list(ask(scheduler, adapters["one"], TOKENS[:9], 20)) == alone("one", TOKENS[:9], 20)
    assert len([scheduler.reserve() for _ in range(scheduler.capacity)]) == scheduler.capacity


def test_the_idle_adapter_whose_last_use_is_longest_ago_is_dropped_first(served, monkeypatch) -> None:
    scheduler, adapters = served
    for name in ("nine", "one"):
        list(ask(scheduler, adapters[name], TOKENS[:5], 2))
    wait_for(lambda: scheduler.active == 0)
    gate = Gate(monkeypatch)
    running = ask(scheduler, adapters["two targets"], TOKENS[:5], 40)
    assert scheduler.adapters.drop_idle() is adapters["nine"]
    with scheduler.reserve() as place:  # a request whose prompt is still made
        place.use(adapters["one"])
        assert scheduler.adapters.drop_idle() is None
    assert scheduler.adapters.drop_idle() is adapters["one"]
    assert scheduler.adapters.held == (adapters["two targets"],)
    gate.opened.set()
    assert len(list(running)) == 40


def test_a_scheduler_that_was_closed_loads_no_adapter_and_drops_them_quietly(served) -> None:
    scheduler, adapters = served
    stream = ask(scheduler, adapters["nine"], TOKENS[:5], 100)
    scheduler.adapters.drop(adapters["nine"])
    scheduler.close()
    assert len(list(stream)) == 100
    with pytest.raises(SchedulerClosedError):
        scheduler.adapters.load("nine", ADAPTERS["nine"])
