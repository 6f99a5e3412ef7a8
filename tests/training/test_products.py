"""However matrices are multiplied, the identities of training hold."""

import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from interrupted import run
from test_objectives import CPU, groups_of, one_batch
from test_rollouts import stream_for

from twinloop.common.errors import UserError
from twinloop.models.products import Products, linear, products_in_use, use_products
from twinloop.training.loop import _accumulate, run_training
from twinloop.training.objectives import CausalLMLoss, DPOLoss, GRPOLoss
from twinloop.training.packing import pack
from twinloop.training.runtime import Runtime, choose_products, fastest_products, least_seconds
from twinloop.training.scoring import Rows, attach_reference
from twinloop.training.settings import TrainSettings
from twinloop.training.stream import Step, micro_batches
from twinloop.training.tree import collate, scored_logprobs

WAYS = [Products(*each) for each in product(("blas", "onednn"), ("float32", "bfloat16"))]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way.library}-{way.backward}")
def way(request):
    use_products(request.param)
    yield request.param
    use_products(Products())


@pytest.mark.parametrize("shape", [(3, 37, 48), (5, 48), (1, 64, 48)])
def test_a_product_is_the_layers_in_float32_and_its_gradients_near(way, shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(24, 48), torch.randn(24)]
    for tensor in inputs:
        tensor.requires_grad_()
    found, expected = linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, other in zip(gradients, wanted, strict=True):
        error = (gradient - other).abs().max() / other.abs().max()
        assert error < (1e-5 if way.backward == "float32" else 1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in (found, *gradients))


def test_the_first_loss_of_dpo_is_ln_2(way, tiny, texts):
    loss, _ = DPOLoss(beta=0.3).loss(tiny, one_batch(attach_reference(tiny, texts.pairs(9), Rows(64))))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_first_ratio_of_grpo_is_1(way, tiny):
    reports = []
    settings = TrainSettings(learning_rate=0.003)
    run_training(tiny, GRPOLoss(), stream_for(tiny, steps=1), settings, checkpoint_dir=None, on_step=reports.append)
    assert reports[0].metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert reports[0].metrics["logprob_gap_max"] < 1e-4


def test_packed_scores_are_those_of_each_tree_alone(way, tiny, texts):
    trees = [*texts.documents(9), *texts.pairs(9), *groups_of(texts, 5)]
    for tree in trees:
        together = scored_logprobs(tiny, collate([(trees[0], tree)], 256))[trees[0].num_scored :]
        torch.testing.assert_close(together, scored_logprobs(tiny, collate([(tree,)], 256)), atol=5e-6, rtol=1e-5)


def test_micro_batches_add_up_to_the_full_batch(way, tiny, texts):
    rows, gradients = pack(texts.examples(30), 64).rows, []
    for size in (None, 2):
        tiny.zero_grad()
        _accumulate(tiny, CausalLMLoss(), Step(micro_batches(rows, 64, size)), CPU)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in tiny.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < (1e-5 if way.backward == "float32" else 1e-2)


def test_stopped_training_resumes_bit_for_bit(way, tmp_path):
    def stop(report):
        if report.step == 4:
            raise KeyboardInterrupt

    whole, _ = run(tmp_path / "whole", 6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", 6, on_step=stop)
    resumed, result = run(tmp_path / "stopped", 6)
    assert result.resumed_from_step == 3
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_is_not_gone_on_with_in_another_way(tmp_path):
    run(tmp_path, 6)
    use_products(Products(backward="bfloat16"))
    try:
        with pytest.raises(UserError, match="its matrices were multiplied as"):
            run(tmp_path, 6)
    finally:
        use_products(Products())


@pytest.mark.parametrize(
    ("blas", "onednn", "bfloat16", "error", "chosen"),
    [
        (2.0, 1.0, 1.0, 1e-6, ("onednn", "float32")),
        (2.0, 1.0, 0.5, 1e-6, ("onednn", "bfloat16")),
        (2.0, 1.0, 0.5, 4e-3, ("blas", "bfloat16")),  # oneDNN rounds to bfloat16 by itself
        (1.0, 2.0, 0.8, 1e-6, ("blas", "float32")),
        (1.0, 0.8, 0.8, 1e-6, ("blas", "float32")),  # noise
        (1.0, 1.0, 9.0, 1e-6, ("blas", "float32")),
    ],
)
def test_another_way_to_multiply_is_taken_where_it_is_much_faster_and_right(blas, onednn, bfloat16, error, chosen):
    assert choose_products({"blas": blas, "onednn": onednn, "bfloat16": bfloat16}, error) == chosen


@pytest.mark.parametrize(("noisy_rounds", "rounds"), [(0, 20), (150, 151), (1000, 300)])
def test_noise_in_one_way_to_multiply_is_waited_for(monkeypatch, noisy_rounds, rounds):
    seconds = {"blas": 1.05, "onednn": 1.0, "bfloat16": 0.5}
    now, done = [0.0], dict.fromkeys(seconds, 0)
    monkeypatch.setattr("twinloop.training.runtime.time.thread_time", lambda: now[0])

    def multiply(name: str) -> None:
        done[name] += 1
        now[0] += seconds[name] * (1.5 if name == "blas" and done[name] <= noisy_rounds else 1)

    least = least_seconds({name: partial(multiply, name) for name in seconds})
    assert set(done.values()) == {rounds}
    assert (choose_products(least, 1e-6)[0] == "blas") == (noisy_rounds < rounds)


def test_what_is_chosen_is_measured_here_and_a_runtime_uses_it():
    library, backward = fastest_products.__wrapped__()
    assert (library, backward) in product(("blas", "onednn"), ("float32", "bfloat16"))
    Runtime(seed=1, threads=1, library=library, backward="bfloat16").use()
    try:
        assert products_in_use() == Products(library, "bfloat16")
    finally:
        use_products(Products())
