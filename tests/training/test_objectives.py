"""Each objective on its first step, and cut into micro-batches."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from twinloop.training.loop import _accumulate
from twinloop.training.objectives import CausalLMLoss, DPOLoss, GRPOLoss
from twinloop.training.packing import pack
from twinloop.training.scoring import Rows, attach_reference
from twinloop.training.stream import BatchStream, Step, micro_batches
from twinloop.training.tree import Tree, collate, document, example, group, pair, scored_logprobs

CPU = torch.device("cpu")


def one_batch(trees, seq_len=64):
    return collate(pack(trees, seq_len).rows, seq_len)


def groups_of(texts, count):
    trees = []
    for _ in range(count):
        completions = [texts.run(2, 9) for _ in range(3)]
        old = [texts.rng.normal(-4, 0.3, len(tokens)).tolist() for tokens in completions]
        trees.append(group(texts.run(4, 9), completions, advantages=texts.rng.normal(size=3), old_logprobs=old))
    return trees


def test_first_loss_of_an_untrained_network_is_about_the_uniform_guess(tiny, texts):
    batch = one_batch(texts.documents(8))
    loss, _ = CausalLMLoss().loss(tiny, batch)
    assert abs(loss.item() - math.log(64)) < 0.1


def test_first_dpo_loss_is_ln_2(tiny, texts):
    trees = attach_reference(tiny, texts.pairs(9), Rows(64))
    batch = one_batch(trees)
    loss, metrics = DPOLoss(beta=0.1).loss(tiny, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-4)


def test_dpo_step_raises_the_chosen_over_the_rejected(tiny, texts):
    batch = one_batch(attach_reference(tiny, texts.pairs(6), Rows(64)))
    loss, _ = DPOLoss(beta=0.1).loss(tiny, batch)
    loss.backward()
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter -= 0.5 * parameter.grad
    after, metrics = DPOLoss(beta=0.1).loss(tiny, batch)
    assert after < loss
    assert metrics["accuracy"] == 1.0


def two_pairs():
    """Sequences of 2, 1, 3 and 2 tokens; log-probabilities of the policy, and of the reference, which lie 0.25 apart in
    each token of the chosen, and as far the other way in each of the rejected."""
    trees = [pair([8, 9], [10, 11], [12]), pair([8], [13, 14, 15], [16, 17])]
    policy = torch.tensor([-1.0, -2.0, -0.5, -1.5, -2.5, -3.0, -0.25, -0.75])
    apart = torch.tensor([0.25, 0.25, -0.25, 0.25, 0.25, 0.25, -0.25, -0.25])
    batch = replace(collate([(trees[0],), (trees[1],)], 8), reference_logprobs_N=policy - apart)
    return policy, batch


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


SUMS, MEANS = (0.75, 1.25), (0.5, 0.5)  # margins of the two pairs: of sums over tokens, of means


@pytest.mark.parametrize(
    ("settings", "margins", "pair_loss"),
    [
        ({}, SUMS, lambda m: -log_sigmoid(0.4 * m)),
        ({"loss": "ipo"}, SUMS, lambda m: (m - 1 / 0.8) ** 2),
        ({"label_smoothing": 0.1}, SUMS, lambda m: -0.9 * log_sigmoid(0.4 * m) - 0.1 * log_sigmoid(-0.4 * m)),
        ({"length_normalised": True}, MEANS, lambda m: -log_sigmoid(0.4 * m)),
        ({"length_normalised": True, "loss": "ipo"}, MEANS, lambda m: (m - 1 / 0.8) ** 2),
    ],
)
def test_dpo_and_its_kin_by_their_formulas(settings, margins, pair_loss):
    policy, batch = two_pairs()
    loss, metrics = DPOLoss(beta=0.4, **settings).of_logprobs(policy, batch)
    assert loss.item() == pytest.approx(sum(map(pair_loss, margins)) / 2, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(sum(margins) / 2, abs=1e-6)
    assert metrics["accuracy"] == 1.0


def test_the_sft_term_is_the_mean_loss_of_the_chosen_answers_tokens():
    policy, batch = two_pairs()
    without, _ = DPOLoss(beta=0.4).of_logprobs(policy, batch)
    loss, metrics = DPOLoss(beta=0.4, rpo_alpha=0.5).of_logprobs(policy, batch)
    chosen = (1.5 + 7 / 3) / 2  # a pair's mean first, then that of the pairs
    assert metrics["chosen_loss"].item() == pytest.approx(chosen, abs=1e-6)
    assert (loss - without).item() == pytest.approx(0.5 * chosen, abs=1e-6)


def test_first_losses_of_dpos_kin(tiny, texts):
    batch = one_batch(attach_reference(tiny, texts.pairs(9), Rows(64)))
    for beta in (0.1, 0.5):
        for normalised in (False, True):
            ipo, _ = DPOLoss(beta=beta, loss="ipo", length_normalised=normalised).loss(tiny, batch)
            assert ipo.item() == pytest.approx((1 / (2 * beta)) ** 2, rel=1e-5)
        smoothed, _ = DPOLoss(beta=beta, label_smoothing=0.2).loss(tiny, batch)
        assert smoothed.item() == pytest.approx(math.log(2), abs=1e-5)


def test_ipo_ends_at_its_margin_and_smoothed_dpo_at_the_smoothed_odds():
    """Where the gradient vanishes: m = 1 / (2 beta); and σ(beta m) = 1 - label_smoothing. Plain DPO has no such end."""
    for settings, end in (({"loss": "ipo"}, 1 / 0.8), ({"label_smoothing": 0.1}, math.log(9) / 0.4)):
        margin = torch.tensor([end - 0.1, end, end + 0.1], requires_grad=True)
        DPOLoss(beta=0.4, **settings).of_margins(margin).sum().backward()
        below, at, above = margin.grad.tolist()
        assert below < 0 < above
        assert at == pytest.approx(0, abs=1e-6)


def test_reference_stays_with_its_pair_under_shuffling_and_partial_batches(tiny, texts):
    trees = attach_reference(tiny, texts.pairs(23), Rows(64))
    random.Random(0).shuffle(trees)
    stream = BatchStream(trees, seq_len=64, batch_size=4, seed=3, epochs=2)
    pairs = 0
    for _ in range(stream.total_steps):
        for batch in stream.next().micro_batches:
            torch.testing.assert_close(batch.reference_logprobs_N, scored_logprobs(tiny, batch), atol=5e-6, rtol=1e-5)
            pairs += batch.num_sequences // 2
    assert pairs == 2 * 23


def test_grpo_by_hand():
    """Two completions of two tokens and one token; one ratio past the clip, on either side of the advantage."""
    tree = group([8, 9], [[10, 11], [12]], advantages=[1.0, -1.0], old_logprobs=[[-1.0, -1.0], [-2.0]])
    batch = collate([(tree,)], 8)
    logprobs = torch.tensor([-1.0 + math.log(1.5), -1.0, -2.0 + math.log(0.5)], requires_grad=True)
    loss, metrics = GRPOLoss(clip_eps=0.2).of_logprobs(logprobs, batch)
    # clipped to 1.2; 1; and for the negative advantage min(-0.5, -0.8)
    assert loss.item() == pytest.approx(-(1.2 + 1.0 - 0.8) / 3)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 3)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -1 / 3, 0.0])


def test_kl_penalty_is_zero_at_the_reference_and_pulls_back_from_elsewhere(tiny, texts):
    """Sampled and judged alike, so that the penalty is all that is left of the loss and its gradient."""
    trees = groups_of(texts, 3)
    trees = [Tree(tuple(replace(each, advantage=np.zeros(each.num_scored)) for each in t.segments)) for t in trees]
    batch = one_batch(attach_reference(tiny, trees, Rows(64)))
    reference = scored_logprobs(tiny, batch).detach()
    for shift in (0.0, -0.5, 0.5):
        logprobs = (reference + shift).requires_grad_()
        loss, metrics = GRPOLoss(kl_coef=0.1).of_logprobs(logprobs, batch)
        loss.backward()
        divergence = math.exp(-shift) + shift - 1
        assert metrics["reference_kl"].item() == pytest.approx(divergence, abs=1e-4)
        assert loss.item() == pytest.approx(0.1 * divergence, abs=1e-5)
        expected = 0.1 * (1 - math.exp(-shift)) / len(logprobs)
        torch.testing.assert_close(logprobs.grad, torch.full_like(reference, expected), atol=1e-6, rtol=1e-3)
        assert torch.all(logprobs.grad.sign() == math.copysign(1, shift)) or not shift  # descent leads back


@pytest.mark.parametrize("kind", ["next_token", "preference", "kin", "group"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_accumulated_micro_batches_equal_the_full_batch(tiny, texts, kind, micro_batch_size):
    """Rows of very different token counts: a mean of means would differ."""
    objective, trees = {
        "next_token": lambda: (CausalLMLoss(), [*texts.examples(12), document(texts.run(60, 60)), document([7, 8])]),
        "preference": lambda: (DPOLoss(beta=0.3), attach_reference(tiny, texts.pairs(15), Rows(64))),
        "kin": lambda: (
            DPOLoss(beta=0.3, loss="ipo", length_normalised=True, rpo_alpha=0.5),
            attach_reference(tiny, texts.pairs(15), Rows(64)),
        ),
        "group": lambda: (GRPOLoss(), groups_of(texts, 12)),
    }[kind]()
    if kind in ("preference", "kin"):  # away from the reference, else every gradient is the same at any cut
        with torch.no_grad():
            for parameter in tiny.parameters():
                parameter *= 1.05
    rows = pack(trees, 64).rows
    assert len(rows) > micro_batch_size
    losses, gradients = [], []
    for size in (None, micro_batch_size):
        tiny.zero_grad()
        loss, metrics = _accumulate(tiny, objective, Step(micro_batches(rows, 64, size)), CPU)
        losses.append({"loss": loss, **metrics})
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in tiny.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-6, rtol=1e-4)


def test_an_answer_weighs_by_its_tokens_not_by_its_example(tiny):
    short, long = example([8, 9], [10]), example([8, 9], [11] * 9)
    batch = one_batch([short, long])
    logprobs = scored_logprobs(tiny, batch)
    loss, _ = CausalLMLoss().of_logprobs(logprobs, batch)
    assert loss.item() == pytest.approx(-logprobs.mean().item(), abs=1e-6)
