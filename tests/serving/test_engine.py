"""The engine: one in-place cache, whatever way the tokens come into it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from engine_memory import held_bytes

from twinloop.common.errors import UserError
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.serving.engine.session import cuda_devices

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
MAX_LENGTH = 48
STOP = 7
BOUND = {"cpu": 1e-4, "cuda": 0.15}
"""Largest difference of a logit between two ways of computing it: in float32, and in bfloat16 (they spread over 2)."""

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available() or not cuda_devices(), reason="no CUDA device")


def random_network(device: str) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG).requires_grad_(False).eval()
    model.model.embed_tokens.weight.mul_(10)
    return model.to(device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def network(request) -> Decoder:
    return random_network(request.param)


def bind(network: Decoder, slots: int = 4) -> Engine:
    weights = {name: ort.OrtValue.from_dlpack(tensor.detach()) for name, tensor in network.state_dict().items()}
    return Engine.from_weights(CONFIG, weights, max_length=MAX_LENGTH, slots=slots)


@pytest.fixture
def engine(network) -> Engine:
    return bind(network)


def forced_logits(network: Decoder, tokens: np.ndarray) -> np.ndarray:
    device = network.model.norm.weight.device
    positions = torch.arange(len(tokens), device=device)[None]
    return network.logits(network.hidden(torch.from_numpy(tokens)[None].to(device), positions))[0].cpu().numpy()


def some_tokens(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count)


def assert_close(engine: Engine, actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=BOUND[engine.device])


def decode_one(engine: Engine, slot: int, token: int) -> np.ndarray:
    return engine.decode(slot, np.array([token]), np.array([True]))[0].copy()


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [some_tokens(length, seed=length).tolist() for length in lengths]


# --- one result, many ways ---------------------------------------------------------------------------------------


def test_scores_equal_the_networks_logits(engine, network):
    tokens = some_tokens(MAX_LENGTH)
    assert_close(engine, engine.score(tokens), forced_logits(network, tokens))
    assert_close(engine, engine.score(tokens, slot=2, chunk=5), forced_logits(network, tokens))


def test_prefill_then_decode_equals_one_full_pass(engine, network):
    tokens = some_tokens(20)
    expected = forced_logits(network, tokens)
    assert_close(engine, engine.prefill(1, tokens[:12]), expected[11])
    for position in range(12, 20):
        assert_close(engine, decode_one(engine, 1, tokens[position]), expected[position])
    assert engine.lengths.tolist() == [0, 20, 0, 0]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_prompt_in_chunks_equals_the_prompt_at_once(engine, network, chunk):
    tokens = some_tokens(20)
    assert_close(engine, engine.prefill(0, tokens, chunk=chunk), forced_logits(network, tokens)[-1])
    assert_close(engine, decode_one(engine, 0, 5), forced_logits(network, np.append(tokens, 5))[-1])


def test_a_step_over_mixed_lengths_equals_each_slot_alone(engine, network):
    histories = {slot: some_tokens(length, seed=slot).tolist() for slot, length in enumerate((5, 30, 1, 17))}
    for slot, tokens in histories.items():
        engine.prefill(slot, tokens)
    for step in range(6):
        tokens = some_tokens(4, seed=100 + step)
        logits = engine.decode(0, tokens, np.ones(4, bool))
        for slot, history in histories.items():
            history.append(int(tokens[slot]))
            assert_close(engine, logits[slot], forced_logits(network, np.array(history))[-1])


def test_idle_slots_keep_their_content(engine, network):
    """Also an empty one and a full one: what an idle row writes lies behind its slot's last token."""
    full = some_tokens(MAX_LENGTH)
    engine.prefill(1, full[:12])
    engine.prefill(2, full)
    engine.prefill(3, full[:4])
    for token in (4, 5, 6):
        engine.decode(0, np.full(4, token), np.array([False, False, False, True]))
    assert engine.tokens_CM[1, :12].tolist() == full[:12].tolist()
    assert engine.tokens_CM[3, :7].tolist() == [*full[:4], 4, 5, 6]
    assert engine.lengths.tolist() == [0, 12, MAX_LENGTH, 7]
    assert_close(engine, decode_one(engine, 1, full[12]), forced_logits(network, full[:13])[-1])
    again = engine.prefill(2, full[-1:], start=MAX_LENGTH - 1)
    assert_close(engine, again, forced_logits(network, full)[-1])


def test_a_copied_prefix_continues_like_its_own(engine, network):
    tokens = some_tokens(20)
    engine.prefill(3, tokens)
    engine.copy_prefix(3, [0, 2], 15)
    for slot in (0, 2):
        expected = forced_logits(network, np.array([*tokens[:15], 1, 2]))[-1]
        assert_close(engine, engine.prefill(slot, [1, 2], start=15), expected)
    assert_close(engine, decode_one(engine, 3, 9), forced_logits(network, np.append(tokens, 9))[-1])


def test_slots_that_exchange_their_content_go_on_as_each_other(engine, network):
    short, long = some_tokens(5, seed=2), some_tokens(20)
    engine.prefill(0, short)
    engine.prefill(3, long)
    engine.swap(0, 3)
    assert engine.lengths.tolist() == [20, 0, 0, 5]
    for slot, tokens in ((0, long), (3, short)):
        assert engine.tokens_CM[slot, : len(tokens)].tolist() == tokens.tolist()
        assert_close(engine, decode_one(engine, slot, 9), forced_logits(network, np.append(tokens, 9))[-1])


# --- no cache byte is copied -------------------------------------------------------------------------------------


def test_past_and_present_are_one_memory_that_never_moves(engine, monkeypatch):
    bound: dict[int, tuple[ort.IOBinding, dict[str, dict[str, tuple]]]] = {}
    engine.prefill(0, some_tokens(3))
    before = [engine._arena.address(block, 0) for block in range(4)]

    def record(direction, method):
        def bind_recorded(binding, name, device, index, kind, shape, address):
            if "." in name:
                key = name.removeprefix("past_key_values.").removeprefix("present.")
                _, addresses = bound.setdefault(id(binding), (binding, {"in": {}, "out": {}}))
                addresses[direction][key] = tuple(shape), address
            return method(binding, name, device, index, kind, shape, address)

        return bind_recorded

    monkeypatch.setattr(ort.IOBinding, "bind_input", record("in", ort.IOBinding.bind_input))
    monkeypatch.setattr(ort.IOBinding, "bind_output", record("out", ort.IOBinding.bind_output))
    engine.prefill(0, some_tokens(9))
    engine.generate(prompts_of([3, 9, 4, 5, 7]), SamplingParams(max_tokens=20), group=2)
    steps = [addresses for _, addresses in bound.values() if addresses["in"]]  # on CUDA, copies have bindings too
    assert len(steps) > 5
    assert [engine._arena.address(block, 0) for block in range(4)] == before
    for step in steps:
        assert len(step["in"]) == 2 * CONFIG.num_hidden_layers
        assert step["in"] == step["out"]
        for name, block in zip(engine._arena.names, range(4), strict=True):
            shape, address = step["in"][name]
            past_start = address - engine._arena.address(block, 0)
            assert past_start % engine._arena.slot_bytes == 0
            assert 0 <= past_start <= (engine.slots - shape[0]) * engine._arena.slot_bytes


def test_the_binding_of_every_step_outlives_those_of_many_prompts(engine, monkeypatch):
    monkeypatch.setattr("twinloop.serving.engine.runner._BINDINGS_KEPT", 4)
    bind, bound = ort.InferenceSession.io_binding, []
    monkeypatch.setattr(ort.InferenceSession, "io_binding", lambda self: bound.append(self) or bind(self))
    engine.reset()
    engine.prefill(0, [1, 2, 3])
    one, active = np.array([1]), np.array([True])
    engine.decode(0, one, active)
    bound.clear()
    lengths = range(2, 10)
    for length in lengths:  # each prompt's length has a binding of its own
        engine.prefill(1, list(range(1, length + 1)))
        engine.decode(0, one, active)
    assert len(bound) == len(lengths)


def test_steps_reuse_their_bindings(engine, monkeypatch):
    engine.generate(prompts_of([3, 9]), SamplingParams(max_tokens=20))
    monkeypatch.setattr(ort.InferenceSession, "io_binding", lambda self: pytest.fail("a step was bound again"))
    engine.generate(prompts_of([3, 9]), SamplingParams(max_tokens=20))


# --- somebody else's weights -------------------------------------------------------------------------------------


def test_an_optimizer_step_in_place_shows_in_the_next_run(network):
    network.requires_grad_(True)
    engine = bind(network)
    tokens = some_tokens(20)
    before = engine.score(tokens)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    device = network.model.norm.weight.device
    positions = torch.arange(20, device=device)[None]
    network.logits(network.hidden(torch.from_numpy(tokens)[None].to(device), positions)).square().mean().backward()
    optimizer.step()
    network.requires_grad_(False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    after = engine.score(tokens)
    assert np.abs(after - before).max() > 0.1
    assert_close(engine, after, forced_logits(network, tokens))


def test_weights_of_another_network_are_refused(network):
    weights = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in network.state_dict().items()}
    wider = CONFIG.model_copy(update={"intermediate_size": 161})
    with pytest.raises(ValueError, match=r"gate_proj\.weight has shape \(160, 64\), the network's is \(161, 64\)"):
        Engine.from_weights(wider, weights, max_length=MAX_LENGTH)
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lack model\.norm\.weight"):
        Engine.from_weights(CONFIG, weights, max_length=MAX_LENGTH)


def test_the_cache_has_a_place_for_every_token_of_every_slot(network):
    arena = 2 * 2 * 4 * CONFIG.num_key_value_heads * 64 * CONFIG.head_dim  # layers, key and value, slots, ..., capacity
    itemsize = 4 if network.model.norm.weight.device.type == "cpu" else 2
    assert held_bytes(bind(network)) == arena * itemsize


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_is_a_function_of_its_arguments_whatever_happened_before(engine):
    prompts = prompts_of([3, 9, 4, 15, 7, 2])
    sampled = SamplingParams(max_tokens=12, temperature=1.0, seed=5, stop=(STOP,))
    first = engine.generate(prompts, sampled, group=3)
    engine.generate(prompts_of([30, 31]), SamplingParams(max_tokens=9, temperature=1.0))
    engine.score(some_tokens(40), slot=1)
    assert engine.generate(prompts, sampled, group=3) == first
    assert engine.generate(prompts, replace(sampled, seed=6), group=3) != first


def test_who_shares_the_batch_changes_no_ones_tokens():
    """In float32: bfloat16's rounding, which differs with the batch, is large enough to move a draw."""
    prompts = prompts_of([3, 9, 4, 15, 7, 2])
    sampled = SamplingParams(max_tokens=12, temperature=1.0, seed=5, stop=(STOP,))
    engines = [bind(random_network("cpu"), slots) for slots in (1, 3, 32)]
    first, *others = [[answer.tokens for answer in engine.generate(prompts, sampled, group=3)] for engine in engines]
    assert all(tokens == first for tokens in others)


def test_the_order_of_prompts_changes_no_greedy_answer():
    engine = bind(random_network("cpu"))
    prompts = prompts_of([3, 9, 4, 15, 7, 2])
    forward = engine.generate(prompts, SamplingParams(max_tokens=12))
    backward = engine.generate(prompts[::-1], SamplingParams(max_tokens=12))
    assert [completion.tokens for completion in forward] == [completion.tokens for completion in backward[::-1]]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_the_distribution_drawn_from(engine, network, temperature):
    prompts = prompts_of([3, 9, 4])
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=2, stop=(STOP,))
    completions = engine.generate(prompts, params, group=2)
    for index, completion in enumerate(completions):
        prompt = prompts[index // 2]
        logits = torch.from_numpy(forced_logits(network, np.array(prompt + completion.tokens)))[len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        expected = logprobs[torch.arange(len(completion.tokens)), completion.tokens]
        np.testing.assert_allclose(completion.logprobs, expected, atol=2 * BOUND[engine.device])
        if temperature == 0 and engine.device == "cpu":
            assert completion.tokens == logits.argmax(-1).tolist()


def test_an_answer_ends_with_its_stop_token_or_with_the_room(engine):
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, stop=(STOP,))
    completions = engine.generate(prompts_of([3, 40]), params, group=8)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for index, completion in enumerate(completions):
        most = 30 if index < 8 else MAX_LENGTH - 40
        assert len(completion.tokens) == len(completion.logprobs) <= most
        assert (completion.tokens[-1] == STOP) == (completion.finish_reason == "stop")
        assert STOP not in completion.tokens[:-1]
        assert completion.finish_reason == "stop" or len(completion.tokens) == most


@pytest.mark.parametrize("group", [4, 11])
def test_a_group_computes_its_prompt_once(engine, monkeypatch, group):
    """Also where it has more members than there are slots."""
    prefilled = []
    prefill = Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda self, slot, tokens, **at: (
        prefilled.append(len(tokens)), prefill(self, slot, tokens, **at))[1])  # fmt: skip
    engine.generate(prompts_of([20]), SamplingParams(max_tokens=9, temperature=1.0, seed=0), group=group)
    assert prefilled == [20]


@pytest.mark.parametrize(("prompt", "words"), [
    ([1] * MAX_LENGTH, "48 tokens, but a slot holds 1 to 47"),
    ([], "0 tokens"),
    ([1, CONFIG.vocab_size], "token ids must lie in 0..95"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_answered_is_refused(engine, prompt, words):
    with pytest.raises(UserError, match=words):
        engine.generate([[1, 2], prompt], SamplingParams(max_tokens=4))


# --- the package -------------------------------------------------------------------------------------------------


def test_serving_imports_no_torch():
    code = "import twinloop.serving.engine.scheduler, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
