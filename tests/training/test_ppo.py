"""PPO: its arithmetic against formulas, and the method on the real engine with a critic that shares the network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import TINY
from test_loop import StoppedError, same_weights, stop_at
from test_rollouts import as_text, rewarded

from twinloop.common.errors import UserError
from twinloop.models.adapter_form import AdapterForm
from twinloop.models.directory import save_model
from twinloop.training import checkpoint
from twinloop.training.adapters import attach_adapter, trained_tensors
from twinloop.training.credit import KLController, explained_variance, generalised_advantages, whitened
from twinloop.training.loop import _accumulate, run_training
from twinloop.training.methods import ppo
from twinloop.training.objectives import PPOLoss
from twinloop.training.packing import pack
from twinloop.training.runtime import Runtime
from twinloop.training.stream import Step, micro_batches
from twinloop.training.tree import collate, group
from twinloop.training.weights import get_weights, load_decoder, new_decoder

STOP = 5
CPU = torch.device("cpu")
RUNTIME = Runtime(seed=3, threads=1)
RECORDS = [{"prompt": [1, 10 + i, 20 + i, 30 + i][: 2 + i % 3]} for i in range(11)]


def tokenizer(ids=TINY.vocab_size):
    return SimpleNamespace(encode_prompt=list, decode=as_text, stop_ids=(STOP,), vocab_size=ids)


def settings(**changes):
    fields = {"learning_rate": 0.01, "steps": 8, "prompts_per_step": 6, "max_new_tokens": 12, "warmup_ratio": 0.0}
    return ppo.Settings(**fields | {"epochs": 2, "minibatches": 2, "kl_coef": 0.1} | changes)


def network(lora=False):
    """Answers end now and then: the stop token's embedding is scaled up."""
    model = new_decoder(TINY, seed=0)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 8
        model.model.embed_tokens.weight[STOP] *= 3
    if lora:
        attach_adapter(model, AdapterForm(rank=3, alpha=12.0), seed=0, stage="ppo")
    return model


def short(text):
    return rewarded(float(len(text) < 6))


def build(model, chosen, reward=short, records=RECORDS, ids=TINY.vocab_size):
    domain = SimpleNamespace(name="d", read_facts=lambda record: record, verify=lambda text, facts: reward(text))
    return ppo.build(records, model, tokenizer(ids), chosen, RUNTIME, domain)


def train(model, chosen, **options):
    objective, rollouts = build(model, chosen)
    result = run_training(model, objective, rollouts, chosen, **{"checkpoint_dir": None} | options)
    return objective, result


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_errors(gamma, lam):
    """Against its definition (Schulman et al., 2016, equation 16), a sum over all that comes after each token."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=9), rng.normal(size=9)
    found = generalised_advantages(rewards, values, gamma=gamma, lam=lam)
    following = [*values[1:], 0.0]
    errors = [rewards[t] + gamma * following[t] - values[t] for t in range(9)]
    expected = [sum((gamma * lam) ** (later - t) * errors[later] for later in range(t, 9)) for t in range(9)]
    assert found.tolist() == pytest.approx(expected)


def test_gae_with_lambda_one_is_the_return_less_what_was_expected():
    rewards, values = np.array([0.0, -0.5, 2.0]), np.array([0.3, 0.1, -0.7])
    found = generalised_advantages(rewards, values, gamma=1.0, lam=1.0)
    assert found.tolist() == pytest.approx([1.5 - 0.3, 1.5 - 0.1, 2.0 + 0.7])


def test_whitened_values_have_mean_zero_and_deviation_one():
    found = whitened(np.random.default_rng(1).normal(3, 7, size=200))
    assert (found.mean(), found.std()) == pytest.approx((0, 1), abs=1e-6)
    assert whitened(np.full(4, 2.5)).tolist() == [0, 0, 0, 0]


def test_explained_variance_is_one_for_a_critic_that_knows_and_zero_for_one_that_expects_the_mean():
    returns = np.random.default_rng(2).normal(size=50)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(np.full(50, returns.mean()), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, np.zeros(50)) == 0


def test_the_kl_controller_corrects_by_at_most_a_fifth_a_horizon():
    """Ziegler et al. (2019): the coefficient times 1 + clip(KL / target - 1, -0.2, 0.2) * answers / horizon."""
    controller = KLController(0.1, target=6.0, horizon=1000)
    for kl, factor in ((6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (-3.0, 0.98)):
        before = controller.coef
        controller.update(kl, 100)
        assert controller.coef == pytest.approx(before * factor)
    short = KLController(0.1, target=4.0, horizon=25)
    for _ in range(3):
        short.update(0.0, 128)
    assert short.coef == pytest.approx(0.1 * 0.8**3), "more answers than the horizon: the whole correction, and no more"
    fixed = KLController(0.1)
    fixed.update(60.0, 100)
    assert fixed.coef == 0.1


def test_ppo_by_hand():
    """Ratios on either side of the clip with advantages of their own, and values that moved past theirs."""
    tree = group(
        [8, 9],
        [[10, 11], [12]],
        advantages=[[1.0, -2.0], [-1.0]],
        old_logprobs=[[-1.0, -1.0], [-2.0]],
        old_values=[[0.0, 1.0], [0.5]],
        returns=[[1.0, 1.0], [0.0]],
    )
    batch = collate([(tree,)], 8)
    logprobs = (torch.tensor([-1.0, -1.0, -2.0]) + torch.tensor([1.5, 1.1, 0.5]).log()).requires_grad_()
    values = torch.tensor([0.6, 1.1, 0.4], requires_grad=True)
    loss, metrics = PPOLoss(4, clip_eps=0.2, value_clip=0.2, value_coef=0.5).of_outputs(logprobs, values, batch)
    # 1.2 of 1.5; 1.1 * -2; and min(-0.5, -0.8). 0.6 is clipped to 0.2, whose error is the larger one
    policy, value = -(1.2 - 2.2 - 0.8) / 3, (0.8**2 + 0.1**2 + 0.4**2) / 3 / 2
    assert metrics["policy_loss"].item() == pytest.approx(policy)
    assert metrics["value_loss"].item() == pytest.approx(value)
    assert loss.item() == pytest.approx(policy + 0.5 * value)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 3)
    assert metrics["value_clip_fraction"].item() == pytest.approx(1 / 3)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 2.2 / 3, 0.0])
    assert values.grad.tolist() == pytest.approx([0.0, 0.5 * 0.1 / 3, 0.5 * 0.4 / 3])


def groups_of(texts, count):
    def floats(completions):
        return [texts.rng.normal(-1, 0.5, len(tokens)).tolist() for tokens in completions]

    trees = []
    for _ in range(count):
        completions = [texts.run(2, 9) for _ in range(3)]
        given = {name: floats(completions) for name in ("advantages", "old_logprobs", "old_values", "returns")}
        trees.append(group(texts.run(4, 9), completions, **given))
    return trees


def critic(seed=0):
    objective = PPOLoss(TINY.hidden_size)
    with torch.no_grad():
        objective.head_D.normal_(generator=torch.Generator().manual_seed(seed))
    return objective


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_packed_in_any_cut_is_the_same_loss_and_gradient(tiny, texts, micro_batch_size):
    objective, rows = critic(), pack(groups_of(texts, 12), 64).rows
    assert len(rows) > micro_batch_size
    losses, gradients = [], []
    for size in (None, micro_batch_size):
        tiny.zero_grad()
        objective.zero_grad()
        loss, metrics = _accumulate(tiny, objective, Step(micro_batches(rows, 64, size)), CPU)
        losses.append({"loss": loss, **metrics})
        trained = trained_tensors(tiny, objective)
        gradients.append(torch.cat([tensor.grad.flatten() for tensor in trained.values()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-5, rtol=1e-4)


def test_a_value_is_that_of_the_state_before_its_token_packed_or_alone(tiny, texts):
    objective, trees = critic(), groups_of(texts, 3)
    with torch.no_grad():
        packed = objective.values(tiny, collate(pack(trees, 64).rows, 64))
        alone = []
        for tree in (tree for row in pack(trees, 64).rows for tree in row):
            prompt, *answers = (segment.tokens.tolist() for segment in tree.segments)
            for answer in answers:
                tokens = torch.tensor([[*prompt, *answer]])
                hidden = tiny.hidden(tokens, torch.arange(tokens.shape[1])[None])[0]
                alone.append(hidden[len(prompt) - 1 : -1] @ objective.head_D + objective.bias)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-4)


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_of_each_rollout_is_one_and_the_critic_starts_at_zero(lora, temperature):
    reports = []
    train(network(lora), settings(temperature=temperature), on_step=reports.append)
    assert len(reports) == 8
    for first in (reports[0], reports[4]):
        assert first.metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert first.metrics["logprob_gap_max"] < 1e-4
        assert first.metrics["clip_fraction"] == 0
    assert reports[1].metrics["ratio"] != pytest.approx(1.0, abs=1e-5)
    assert reports[0].metrics["value"] == 0
    assert reports[4].metrics["value"] != 0
    assert reports[0].metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert reports[4].metrics["kl"] > 1e-3


def test_where_rows_of_the_network_are_no_token_the_first_ratio_is_one_and_the_reference_is_as_far_as_the_policy():
    model = network()
    objective, rollouts = build(model, settings(), ids=TINY.vocab_size - 4)
    step = rollouts.next()
    assert step.metrics["kl"] == pytest.approx(0, abs=1e-4)
    for batch in step.micro_batches:
        _, metrics = objective.loss(model, batch)
        assert metrics["ratio"].item() == pytest.approx(1.0, abs=1e-5)
        assert metrics["logprob_gap_max"].item() < 1e-4


def test_an_answer_earns_its_reward_with_its_last_token_less_what_its_tokens_cost():
    """Of a network away from its reference, by a second look at each answer alone."""
    model = network(lora=True)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            if "lora_B" in name:
                tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    chosen = settings(gamma=1.0, lam=1.0, minibatches=1, kl_coef=0.3)
    _, rollouts = build(model, chosen)
    step = rollouts.next()
    reference, kls = network(), []
    for rollout in rollouts.state()["pending"]:
        prompt = RECORDS[rollout["prompt"]]["prompt"]
        for tokens, logprobs, returns in zip(
            rollout["completions"], rollout["logprobs"], rollout["returns"], strict=True
        ):
            ids = torch.tensor([[*prompt, *tokens]])
            with torch.no_grad():
                logits = reference.logits(reference.hidden(ids, torch.arange(ids.shape[1])[None]))[0]
            theirs = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
            costs = 0.3 * (np.array(logprobs) - theirs.numpy())
            text = [token for token in tokens if token != STOP]
            expected = float(len(text) < 6) - np.cumsum(costs[::-1])[::-1]
            assert returns == pytest.approx(expected.tolist(), abs=1e-4)
            kls.append(costs.sum() / 0.3)
    assert step.metrics["kl"] == pytest.approx(np.mean(kls), abs=1e-4)
    advantages = torch.cat([batch.advantage_N for batch in step.micro_batches])
    assert (advantages.mean().item(), advantages.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-5)


def test_each_epoch_deals_every_group_into_one_minibatch_anew():
    _, rollouts = build(network(), settings(epochs=3))
    dealt = []
    for _ in range(3):
        halves = [rollouts.next().micro_batches for _ in range(2)]
        prompts = [[tuple(batch.tokens_BL[0, :12].tolist()) for batch in half] for half in halves]
        assert sum(batch.num_sequences for half in halves for batch in half) == 6
        dealt.append(prompts)
    assert len({repr(each) for each in dealt}) == 3


def test_without_a_penalty_there_is_no_reference_and_nothing_costs():
    _, rollouts = build(network(), settings(kl_coef=0.0, lam=1.0))
    step = rollouts.next()
    assert "kl" not in step.metrics
    assert {value for batch in step.micro_batches for value in batch.return_N.tolist()} <= {0.0, 1.0}


def test_a_target_moves_the_coefficient():
    reports = []
    train(network(), settings(kl_target=0.5, kl_horizon=30), on_step=reports.append)
    assert reports[0].metrics["kl_coef"] == 0.1
    assert reports[4].metrics["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 6 / 30))  # the KL was 0


def test_a_target_without_a_coefficient_to_steer_is_refused():
    with pytest.raises(ValueError, match="begins at kl_coef and stays 0"):
        settings(kl_target=1.0, kl_coef=0.0)


@pytest.mark.parametrize("target", [{}, {"kl_target": None}])
def test_a_horizon_of_a_coefficient_that_is_fixed_is_refused(target):
    with pytest.raises(ValueError, match="kl_horizon: without kl_target the coefficient is fixed; set kl_target too"):
        settings(kl_horizon=100, **target)
    assert settings(**target).kl_horizon == 10_000, "its default is no request"


def test_more_minibatches_than_groups_are_refused():
    with pytest.raises(ValueError, match=r"minibatches \(7\) are of whole groups; take at most prompts_per_step \(6\)"):
        settings(minibatches=7)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_reported_as_the_verifiers(reward):
    _, rollouts = build(network(), settings(), lambda text: rewarded(reward))
    with pytest.raises(
        UserError, match=rf"domain d: verify gave an answer to prompt \d+ the reward {reward}; a reward"
    ):
        rollouts.next()


def test_without_prompts_there_is_nothing_to_sample():
    with pytest.raises(UserError, match="there are no prompts; look at what validation quarantined"):
        build(network(), settings(), records=[])


@pytest.mark.parametrize("lora", [False, True])
def test_stopped_in_any_step_of_a_rollouts_epochs_it_resumes_bit_for_bit(tmp_path: Path, lora):
    chosen = settings(kl_target=0.5, kl_horizon=30)
    whole = network(lora)
    objective, _ = train(whole, chosen)
    assert not torch.equal(objective.head_D, torch.zeros_like(objective.head_D))
    for step in range(2, 9):
        folder = tmp_path / str(step)
        with pytest.raises(StoppedError):
            train(network(lora), chosen, checkpoint_dir=folder, checkpoint_every_s=0.0, on_step=stop_at(step))
        resumed = network(lora)
        critic, result = train(resumed, chosen, checkpoint_dir=folder, checkpoint_every_s=0.0)
        assert result.resumed_from_step == step - 1
        assert same_weights(resumed, whole), f"stopped in step {step}"
        assert same_weights(critic, objective), f"stopped in step {step}"


def test_the_critics_head_is_in_the_checkpoint_with_its_moments_and_not_in_the_model_directory(tmp_path: Path):
    model = network()
    train(model, settings(), checkpoint_dir=tmp_path / "checkpoints")
    kept = checkpoint.latest(tmp_path / "checkpoints").tensors
    assert kept["model/objective.head_D"].abs().max() > 0
    assert "optimizer/adamw/objective.head_D/exp_avg" in kept
    save_model(tmp_path / "model", TINY, get_weights(model))
    assert same_weights(load_decoder(tmp_path / "model"), model)


@pytest.mark.parametrize("group_size", [1, 3])
def test_ppo_raises_the_reward_and_the_critic_learns_to_expect_it(group_size):
    reports = []
    chosen = settings(
        steps=48, group_size=group_size, prompts_per_step=24 // group_size, learning_rate=0.002, lam=1.0, kl_coef=0.01
    )
    train(network(), chosen, on_step=reports.append)
    rewards = [report.metrics["reward"] for report in reports[::4]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
    explained = [report.metrics["explained_variance"] for report in reports[::4]]
    assert explained[0] == 0
    assert np.mean(explained[1:6]) > 0.03


def test_a_penalty_keeps_the_policy_near_its_reference():
    kls = {}
    for coef in (0.0001, 1.0):
        reports = []
        chosen = settings(steps=32, kl_coef=coef, prompts_per_step=24, learning_rate=0.003)
        train(network(), chosen, on_step=reports.append)
        kls[coef] = reports[-1].metrics["kl"]
    assert kls[1.0] < kls[0.0001] / 2


def test_the_same_seed_is_the_same_training():
    first, second = network(), network()
    train(first, settings())
    train(second, settings())
    assert same_weights(first, second)
    assert not same_weights(first, network())
