"""Rollouts on the real engine, bound to the weights that train."""

from dataclasses import replace

import pytest
import torch

from twinloop.domains.domain import Verdict
from twinloop.models.adapter_form import AdapterForm
from twinloop.serving.engine import Engine
from twinloop.serving.engine.sampling import SamplingParams
from twinloop.training.adapters import attach_adapter, frozen_reference
from twinloop.training.credit import group_advantages
from twinloop.training.loop import run_training
from twinloop.training.methods.grpo import GRPOSettings
from twinloop.training.objectives import GRPOLoss
from twinloop.training.rewards import Verifier
from twinloop.training.rollouts import MAX_ROUNDS, REWARDED_ROLLOUTS, RolloutStream
from twinloop.training.runtime import Runtime
from twinloop.training.sampler import BoundSampler
from twinloop.training.settings import TrainSettings
from twinloop.training.weights import new_decoder

STOP = 5
SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, stop=(STOP,))


def rewarded(reward, *, parsed=True):
    return Verdict({}, reward, parsed=parsed)


def by_length(index, text):
    """Rewards short answers; calls the longest unparseable."""
    return rewarded(float(len(text) < 6), parsed=len(text) < 12)


def half_earned(index, text):
    """The same for every answer."""
    return rewarded(0.5)


def as_text(tokens):
    assert STOP not in tokens, "the verifier judges the answer without its stop token"
    return "x" * len(tokens)


def stream_for(
    model,
    *,
    reward=by_length,
    steps=6,
    updates=1,
    temperature=1.0,
    seed=3,
    threads=1,
    device="cpu",
    reference=None,
    vocab_size=None,
    stop_at_reward=None,
):
    prompts = [[1, 10 + i, 20 + i, 30 + i][: 2 + i % 3] for i in range(11)]
    settings = GRPOSettings(
        learning_rate=0.01,
        steps=steps,
        prompts_per_step=5,
        group_size=4,
        max_new_tokens=12,
        temperature=temperature,
        updates_per_rollout=updates,
        stop_at_reward=stop_at_reward,
    )
    runtime = Runtime(seed=seed, threads=threads, device=device)
    judge = Verifier(reward)
    return RolloutStream(
        model,
        prompts,
        judge,
        as_text,
        settings,
        runtime,
        stop_ids=[STOP],
        vocab_size=vocab_size,
        reference=reference,
    )


@pytest.fixture
def eager_to_stop(tiny):
    """A network whose answers end now and then: the stop token's embedding is scaled up."""
    with torch.no_grad():
        tiny.model.embed_tokens.weight *= 8
        tiny.model.embed_tokens.weight[STOP] *= 3
    return tiny


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_grpo_ratio_is_one_within_rounding_on_the_real_engine(eager_to_stop, temperature):
    """Also at a temperature: forgotten on either side, the ratio would be far from 1."""
    step = stream_for(eager_to_stop, temperature=temperature).next()
    for batch in step.micro_batches:
        _, metrics = GRPOLoss().loss(eager_to_stop, batch)
        assert metrics["ratio"].item() == pytest.approx(1.0, abs=1e-5)
        assert metrics["logprob_gap_max"].item() < 1e-4
        assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("lora", [False, True])
def test_where_rows_of_the_network_are_no_token_policy_and_reference_are_normalised_over_the_ids(eager_to_stop, lora):
    """As the sampler is: the padding of a vocabulary may have any share of what all rows are normalised over."""
    ids = eager_to_stop.config.vocab_size - 4
    if lora:
        attach_adapter(eager_to_stop, AdapterForm(rank=3, alpha=12.0), seed=0, stage="grpo")
    step = stream_for(eager_to_stop, vocab_size=ids, reference=frozen_reference(eager_to_stop)).next()
    for batch in step.micro_batches:
        _, metrics = GRPOLoss(kl_coef=0.1).loss(eager_to_stop, batch)
        assert metrics["ratio"].item() == pytest.approx(1.0, abs=1e-5)
        assert metrics["logprob_gap_max"].item() < 1e-4
        torch.testing.assert_close(batch.reference_logprobs_N, batch.old_logprobs_N, atol=1e-4, rtol=0)


def test_an_optimizer_step_is_seen_by_the_next_sample(eager_to_stop):
    sampler = BoundSampler(eager_to_stop, max_length=24, prompts=1, group=4)

    def sample():
        return sampler.generate([[1, 2, 3]], replace(SAMPLED, seed=0), group=4)

    before = sample()
    assert sample() == before
    with torch.no_grad():
        eager_to_stop.model.embed_tokens.weight[7] += 2
    assert sample() != before


def test_engines_that_share_the_prompts_answer_as_one_would(eager_to_stop):
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 9], [3, 3, 3]]
    answers = []
    for threads in (1, 2, 8):
        sampler = BoundSampler(eager_to_stop, max_length=24, prompts=5, group=3, threads=threads)
        assert len(sampler.engines) == min(threads, 5)
        answers.append(
            [completion.tokens for completion in sampler.generate(prompts, replace(SAMPLED, seed=5), group=3)]
        )
    assert len({tuple(tokens) for tokens in answers[0]}) > 5
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]


def test_trainer_and_sampler_stay_together_over_the_steps(eager_to_stop):
    reports = []
    settings = TrainSettings(learning_rate=0.003, warmup_ratio=0.0, decay_ratio=0.0)
    run_training(
        eager_to_stop, GRPOLoss(), stream_for(eager_to_stop), settings, checkpoint_dir=None, on_step=reports.append
    )
    assert len(reports) == 6
    learnt = [report for report in reports if report.metrics["informative_groups"]]
    assert len(learnt) >= 4
    for report in learnt:
        assert report.metrics["logprob_gap_max"] < 1e-4
        assert report.metrics["entropy"] > 0


def test_advantages_are_relative_to_the_group():
    assert group_advantages([1, 0, 0, 1]) == [1.0, -1.0, -1.0, 1.0]
    assert group_advantages([1, 1, 1]) is None
    assert sum(group_advantages([1, 0, 0])) == pytest.approx(0)


def test_groups_without_variance_are_dropped_counted_and_replaced_within_bounds(eager_to_stop):
    step = stream_for(eager_to_stop, reward=lambda index, text: rewarded(1.0)).next()
    assert step.micro_batches == []
    assert step.metrics["groups"] == 5 * MAX_ROUNDS
    assert step.metrics["informative_groups"] == 0
    assert step.metrics["reward"] == 1.0

    def some(index, text):
        return by_length(index, text) if index % 2 else rewarded(0.0)

    step = stream_for(eager_to_stop, reward=some).next()
    assert 5 < step.metrics["groups"] <= 5 * MAX_ROUNDS
    trained = sum(batch.num_sequences for batch in step.micro_batches)
    assert trained == 4 * step.metrics["informative_groups"] > 0


def test_informative_groups_past_the_number_wanted_are_trained_on_too_and_stay_within_bounds(eager_to_stop):
    def three_in_four(index, text):
        return by_length(index, text) if index % 4 else rewarded(0.0)

    stream = stream_for(eager_to_stop, reward=three_in_four, steps=20)
    kept = []
    for _ in range(20):
        step = stream.next()
        kept.append(step.metrics["informative_groups"])
        assert sum(batch.num_sequences for batch in step.micro_batches) == 4 * kept[-1]
    assert max(kept) > 5, "no step went past the number wanted: the test shows nothing"
    assert max(kept) <= 2 * 5 - 1


@pytest.mark.parametrize("threads", [1, 2])
def test_the_engine_samples_on_the_threads_of_the_run(eager_to_stop, threads, monkeypatch):
    engines = []
    make = Engine.from_weights

    def from_weights(*args, **kwargs):
        engines.append(make(*args, **kwargs))
        return engines[-1]

    monkeypatch.setattr(Engine, "from_weights", from_weights)
    stream_for(eager_to_stop, threads=threads).next()
    assert len(engines) == threads


def test_a_step_without_informative_groups_moves_nothing_and_does_not_stop_the_run(eager_to_stop):
    before = {name: tensor.clone() for name, tensor in eager_to_stop.state_dict().items()}
    stream = stream_for(eager_to_stop, reward=lambda index, text: rewarded(0.0), steps=2)
    result = run_training(eager_to_stop, GRPOLoss(), stream, TrainSettings(learning_rate=0.1), checkpoint_dir=None)
    assert result.steps == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in eager_to_stop.state_dict().items())


def test_cut_off_and_unparseable_answers_are_counted(eager_to_stop):
    metrics = stream_for(eager_to_stop).next().metrics
    assert 0 < metrics["length_limited"] < 1
    assert metrics["unparseable"] == pytest.approx(metrics["length_limited"])
    assert 1 <= metrics["length"] <= 12


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("updates", [1, 2])
def test_resumed_rl_continues_bit_for_bit_and_loses_no_rollout(tmp_path, eager_to_stop, updates):
    start = {name: tensor.clone() for name, tensor in eager_to_stop.state_dict().items()}

    def run(folder, stop_at=None):
        model = new_decoder(eager_to_stop.config, seed=0)
        model.load_state_dict(start)
        reference = new_decoder(eager_to_stop.config, seed=0)
        reference.load_state_dict(start)

        def on_step(report):
            if report.step == stop_at:
                raise StoppedError

        stream = stream_for(model, updates=updates, reference=reference)
        settings = TrainSettings(learning_rate=0.02)
        run_training(
            model,
            GRPOLoss(kl_coef=0.05),
            stream,
            settings,
            checkpoint_dir=folder,
            checkpoint_every_s=0.0,
            on_step=on_step,
        )
        return model

    whole = run(tmp_path / "whole")
    assert not torch.equal(whole.model.embed_tokens.weight, start["model.embed_tokens.weight"])
    for stop_at in (2, 3, 4, 6):
        with pytest.raises(StoppedError):
            run(tmp_path / f"at-{stop_at}", stop_at)
        resumed = run(tmp_path / f"at-{stop_at}")
        for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(one, other), f"{name}, stopped in step {stop_at}"


def test_reinforcement_raises_the_reward(eager_to_stop):
    reports = []
    settings = TrainSettings(learning_rate=0.02, warmup_ratio=0.0, decay_ratio=0.0)
    stream = stream_for(eager_to_stop, steps=25)
    run_training(eager_to_stop, GRPOLoss(), stream, settings, checkpoint_dir=None, on_step=reports.append)
    first, last = reports[0].metrics["reward"], reports[-1].metrics["reward"]
    assert last > first + 0.2


@pytest.mark.parametrize("updates", [1, 2])
def test_training_ends_with_the_rollout_that_makes_enough_reward_steady(eager_to_stop, updates):
    def steps(stop_at_reward):
        reports = []
        stream = stream_for(eager_to_stop, steps=20, updates=updates, stop_at_reward=stop_at_reward, reward=half_earned)
        settings = TrainSettings(learning_rate=1e-6)
        result = run_training(eager_to_stop, GRPOLoss(), stream, settings, checkpoint_dir=None, on_step=reports.append)
        assert result.steps == len(reports)
        return result.steps

    assert steps(0.5) == REWARDED_ROLLOUTS * updates
    assert steps(0.51) == 20
    assert steps(None) == 20


def train_on_half_earned(config, folder, on_step=None):
    """Until the reward is steady, with a checkpoint after each step."""
    model = new_decoder(config, seed=0)
    stream = stream_for(model, steps=20, stop_at_reward=0.5, reward=half_earned)
    settings = TrainSettings(learning_rate=1e-6)
    return run_training(
        model, GRPOLoss(), stream, settings, checkpoint_dir=folder, checkpoint_every_s=0.0, on_step=on_step
    )


def test_a_run_that_ended_early_has_ended_when_it_is_called_again(tmp_path, eager_to_stop):
    assert train_on_half_earned(eager_to_stop.config, tmp_path).steps == REWARDED_ROLLOUTS
    again = train_on_half_earned(eager_to_stop.config, tmp_path)
    assert (again.steps, again.resumed_from_step) == (REWARDED_ROLLOUTS, REWARDED_ROLLOUTS)


@pytest.mark.parametrize("stopped_in", [2, 4])
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path, eager_to_stop, stopped_in):
    """Rewards of the rollouts before the interruption count."""

    def on_step(report):
        if report.step == stopped_in:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_on_half_earned(eager_to_stop.config, tmp_path, on_step)
    assert train_on_half_earned(eager_to_stop.config, tmp_path).steps == REWARDED_ROLLOUTS


@pytest.mark.parametrize(("change", "message"), [({"group_size": 1}, "equal to 2"), ({"temperature": 0.0}, "than 0")])
def test_settings_that_cannot_teach_are_refused(change, message):
    fields = {"learning_rate": 0.1, "steps": 1, "prompts_per_step": 1, "group_size": 2}
    with pytest.raises(ValueError, match=message):
        GRPOSettings(**(fields | change))


def test_rows_of_the_network_that_are_no_token_are_never_sampled(tiny):
    """Many base models have more rows in their embeddings than their tokenizer has ids."""
    half = tiny.config.vocab_size // 2
    sampler = BoundSampler(tiny, max_length=24, prompts=1, group=8, vocab_size=half)
    answers = sampler.generate([[1, 2, 3]], replace(SAMPLED, seed=0), group=8)
    assert max(token for answer in answers for token in answer.tokens) < half
