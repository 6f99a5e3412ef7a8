"""The baseline is the same network, a copied cache is seen, a missed target is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.decode import agreement, watch_cache
from benchmarks.lifecycle import broken_demands
from benchmarks.overhead import Stage
from benchmarks.torch_sampler import TorchSampler
from twinloop.evaluation.case_report import CaseReport, CaseResult
from twinloop.evaluation.metrics import Rate
from twinloop.models.config import DecoderConfig
from twinloop.models.decoder import Decoder
from twinloop.models.directory import save_model
from twinloop.models.exported import export_model
from twinloop.serving.engine.kv_cache import KVArena
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.sampler import BoundSampler
from twinloop.training.weights import get_weights, new_decoder

PROJECT = Path(__file__).parents[2]
CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    qk_norm=True,
)


@pytest.fixture(scope="module")
def network() -> Decoder:
    """Its norms of queries and keys are far from doing nothing."""
    torch.set_num_threads(1)
    made = new_decoder(CONFIG, seed=0).requires_grad_(False)
    torch.manual_seed(0)
    for layer in made.model.layers:
        layer.self_attn.q_norm.weight.uniform_(0.2, 3.0)
        layer.self_attn.k_norm.weight.uniform_(0.2, 3.0)
    return made


@pytest.fixture
def exported(network, tmp_path):
    save_model(tmp_path / "model", CONFIG, get_weights(network))
    export_model(tmp_path / "model", tmp_path / "exported", precision="fp32", max_length=64)
    return tmp_path / "exported"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_baseline_answers_as_the_engine_does(network, temperature):
    """Token by token, at temperature 1 from the same draws; rows that end early are dropped on the way."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, CONFIG.vocab_size, length).tolist() for length in (3, 9, 20)]
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=7, stop=(0, 1, 2, 3))
    theirs = TorchSampler(network).generate(prompts, params, group=4)
    engine = BoundSampler(network, max_length=64, prompts=3, group=4)
    ours = [completion.tokens for completion in engine.generate(prompts, params, group=4)]
    assert len(set(map(len, ours))) > 1
    assert agreement(theirs, ours) == 1


def test_a_cache_in_place_is_seen_to_grow_by_one_token_and_nothing_else(exported):
    seen = watch_cache(exported, slots=3, context=10)
    assert (seen.buffers, seen.copied, seen.appended) == (4, 0, 4)


def test_a_cache_written_elsewhere_is_seen_as_copied(exported, monkeypatch):
    elsewhere: list[np.ndarray] = []

    def bind_apart(arena, binding, first, count):
        shape = (count, *arena.slot_shape)
        for block, name in enumerate(arena.names):
            elsewhere.append(np.zeros(shape, np.float32))
            kind, at = arena.element_type, elsewhere[-1].ctypes.data
            binding.bind_input(f"past_key_values.{name}", "cpu", 0, kind, shape, arena.address(block, first))
            binding.bind_output(f"present.{name}", "cpu", 0, kind, shape, at)

    monkeypatch.setattr(KVArena, "bind", bind_apart)
    seen = watch_cache(exported, slots=3, context=10)
    assert seen.copied == sum(array.nbytes for array in elsewhere[-4:])
    assert seen.appended == 0


def report(*, passed: int, claims: int = 0, golden: int = 10) -> CaseReport:
    """`passed` of 500 held-out cases right."""
    kinds = {"golden": Rate(successes=golden, total=10), "injection": Rate(successes=150, total=150)}
    kinds["held_out"] = Rate(successes=passed, total=500)
    return CaseReport(
        cases_digest="",
        overall=Rate(successes=passed + golden + 150, total=660),
        by_kind=kinds,
        by_predicate={},
        pairs={"contrast": Rate(successes=98, total=100)},
        violations={"no_unperformed_action": claims},
        measured={},
        unparsed=0,
        truncated=0,
        results=(CaseResult(case_id="1", kind="golden", pair_id=None, passed=True),),
        failures=(),
    )


def test_thresholds_hold_only_where_every_one_does():
    stages = {"sft": report(passed=300), "dpo": report(passed=400), "grpo": report(passed=490)}
    assert broken_demands(stages) == []
    assert "held_out 94.8% of 500" in broken_demands(stages | {"grpo": report(passed=474)})[0]
    assert "golden 90.0% of 10" in broken_demands(stages | {"grpo": report(passed=490, golden=9)})[0]
    assert "1 violations of critical predicates" in broken_demands(stages | {"grpo": report(passed=490, claims=1)})[0]
    assert "do not rise" in broken_demands(stages | {"dpo": report(passed=300)})[0]


def test_an_overhead_is_scaled_by_what_of_it_grows_with_the_stage():
    stage = Stage(
        whole=15.0, loop=13.0, orchestration=0.1, tracking=0.5, tracking_in_loop=0.2, store=0.3, steps=90, once=5.0
    )
    assert stage.share_of(15.0) == pytest.approx(0.9 / 15)
    assert stage.share_of(60.0) == pytest.approx((0.1 + 0.3 + 0.3 + 4 * 0.2) / 60)


@pytest.mark.slow
def test_a_stage_through_prefect_mlflow_and_the_store_is_measured():
    command = [sys.executable, "-m", "benchmarks.overhead", "recipes/tiny.yaml", "--seconds", "3"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    found = {row[0]: row[2] for row in rows}
    parts = [float(found[f"· {part}"]) for part in ("orchestration", "tracking", "hashing and storing")]
    assert all(part > 0 for part in parts)
    assert sum(parts) < float(found["a whole stage"])
