"""Muon, AdamW and the schedule."""

import pytest
import torch

from twinloop.training.objectives import CausalLMLoss
from twinloop.training.optim import (
    MAX_GRAD_NORM,
    UPDATE_RMS,
    block_rows,
    build_optimizer,
    learning_rate_at,
    orthogonalisers,
)
from twinloop.training.packing import pack
from twinloop.training.settings import TrainSettings
from twinloop.training.tree import collate
from twinloop.training.weights import new_decoder


def backward(model, texts):
    batch = collate(pack(texts.documents(10), 64).rows, 64)
    loss, _ = CausalLMLoss().loss(model, batch)
    loss.backward()
    return loss.item()


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalisers(matrices @ matrices.mT) @ matrices)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_matrix_of_zeros_stays_one():
    zeros = torch.zeros(1, 8, 16)
    assert torch.equal(orthogonalisers(zeros @ zeros.mT) @ zeros, zeros)


def test_blocks_divide_a_matrix_and_are_wide():
    shapes = [(576, 576), (160, 320), (960, 320), (64, 32), (7, 5)]
    assert [block_rows(*shape) for shape in shapes] == [64, 40, 64, 32, 1]


def test_muon_takes_the_steps_of_torchs_own_on_each_block(tiny, texts):
    """Only nearly: torch.optim.Muon takes five steps of Newton-Schulz from a looser bound, in bf16."""
    backward(tiny, texts)
    hidden = {name: p for name, p in tiny.named_parameters() if p.dim() == 2 and "embed" not in name}
    before = {name: p.detach().clone() for name, p in hidden.items()}
    blocks = {}
    for name, parameter in hidden.items():
        size = block_rows(*parameter.shape)
        blocks[name] = [torch.nn.Parameter(block.clone()) for block in before[name].split(size)]
        for block, gradient in zip(blocks[name], parameter.grad.split(size), strict=True):
            block.grad = gradient.clone()
    assert max(map(len, blocks.values())) > 1
    same_size = 0.01 * UPDATE_RMS / 0.2  # theirs is always the 0.2 of Liu et al.
    every = [block for members in blocks.values() for block in members]
    torch.optim.Muon(every, lr=same_size, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    build_optimizer(tiny, TrainSettings(learning_rate=0.01)).step(0.01)
    for name, parameter in hidden.items():
        step = (parameter - before[name]).flatten()
        expected = (torch.cat([block.detach() for block in blocks[name]]) - before[name]).flatten()
        assert torch.cosine_similarity(step, expected, dim=0) > 0.95, name
        assert step.norm().item() == pytest.approx(expected.norm().item(), rel=0.1)


def test_an_update_of_muon_has_the_stated_size_whatever_the_gradient(tiny, texts):
    before = tiny.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = build_optimizer(tiny, TrainSettings(learning_rate=0.01))
    backward(tiny, texts)
    optimizer.step(0.01)
    rms = (tiny.model.layers[0].mlp.up_proj.weight - before).pow(2).mean().sqrt().item()
    assert rms == pytest.approx(0.01 * UPDATE_RMS, rel=0.3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_trained_and_the_loss_falls(tiny, texts, optimizer):
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    chosen = build_optimizer(tiny, TrainSettings(learning_rate=0.01, optimizer=optimizer))
    losses = []
    for _ in range(5):
        texts.rng = type(texts)().rng
        losses.append(backward(tiny, texts))
        chosen.clip_gradients()
        chosen.step(0.01)
    assert losses[-1] < losses[0] - 0.2
    assert all(not torch.equal(p, before[name]) for name, p in tiny.named_parameters())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_restored_state_takes_the_same_next_step(tiny, texts, optimizer):
    settings = TrainSettings(learning_rate=0.01, optimizer=optimizer, weight_decay=0.1)
    first = build_optimizer(tiny, settings)
    backward(tiny, texts)
    first.step(0.01)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    twin = new_decoder(tiny.config, seed=7)
    twin.load_state_dict(tiny.state_dict())
    second = build_optimizer(twin, settings)
    second.restore(saved)
    for model, chosen in ((tiny, first), (twin, second)):
        texts.rng = type(texts)(5).rng
        backward(model, texts)
        chosen.step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_decay_shrinks_the_hidden_matrices_and_nothing_else(tiny, texts, optimizer):
    """The same gradient with and without decay: what differs is the share of the weights that decay takes."""
    start = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    stepped = {}
    for decay in (0.0, 0.5):
        model = new_decoder(tiny.config, seed=0)
        model.load_state_dict(tiny.state_dict())
        chosen = build_optimizer(model, TrainSettings(learning_rate=0.01, optimizer=optimizer, weight_decay=decay))
        texts.rng = type(texts)().rng
        backward(model, texts)
        chosen.step(0.01)
        stepped[decay] = dict(model.named_parameters())
    for name, before in start.items():
        hidden = before.dim() == 2 and "embed" not in name
        taken = 0.01 * 0.5 * before if hidden else torch.zeros_like(before)
        torch.testing.assert_close(stepped[0.0][name] - stepped[0.5][name], taken, atol=1e-6, rtol=1e-3)


def test_gradients_are_clipped_to_their_norm_and_small_ones_left_alone(tiny, texts):
    optimizer = build_optimizer(tiny, TrainSettings(learning_rate=0.01))

    def gradients():
        return torch.cat([p.grad.flatten() for p in tiny.parameters()])

    backward(tiny, texts)
    for scale in (100.0, 1e-3):
        norm = gradients().norm()
        for parameter in tiny.parameters():
            parameter.grad *= scale / norm
        before = gradients()
        assert optimizer.clip_gradients().item() == pytest.approx(scale, rel=1e-4)
        kept = before * min(1.0, MAX_GRAD_NORM / scale)
        torch.testing.assert_close(gradients(), kept, atol=1e-7, rtol=1e-4)


def test_a_matrix_without_a_gradient_is_our_own_mistake(tiny, texts):
    optimizer = build_optimizer(tiny, TrainSettings(learning_rate=0.01))
    backward(tiny, texts)
    tiny.model.layers[1].mlp.up_proj.weight.grad = None
    with pytest.raises(AssertionError, match="each needs a gradient"):
        optimizer.step(0.01)


def test_schedule_warms_up_holds_and_decays_but_never_wastes_a_step():
    settings = TrainSettings(learning_rate=1.0, warmup_ratio=0.1, decay_ratio=0.5)
    rates = [learning_rate_at(step, 100, settings) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:49] == [1.0] * 39
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert min(rates) > 0
    assert rates[-1] < 0.03
    assert [learning_rate_at(s, 1, settings) for s in range(1)] == [1.0]


def test_warmup_and_decay_share_one_run():
    with pytest.raises(ValueError, match="shares of one run"):
        TrainSettings(learning_rate=1.0, warmup_ratio=0.6, decay_ratio=0.6)
