"""LoRA: a frozen base, an adapter that learns, and PEFT's form of it in both directions."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import TINY, Texts
from test_loop import StoppedError, stop_at
from test_rollouts import SAMPLED, as_text, rewarded

from twinloop.models.adapter import Adapter
from twinloop.models.adapter_form import AdapterForm, is_adapter_tensor
from twinloop.models.directory import save_model
from twinloop.training import checkpoint
from twinloop.training.adapters import (
    adapter_of,
    attach_adapter,
    bind_adapter,
    frozen_reference,
    trained_tensors,
    without_adapter,
)
from twinloop.training.loop import run_training
from twinloop.training.methods import dpo, grpo
from twinloop.training.objectives import CausalLMLoss
from twinloop.training.optim import build_optimizer
from twinloop.training.runtime import Runtime
from twinloop.training.sampler import BoundSampler
from twinloop.training.settings import TrainSettings
from twinloop.training.stream import BatchStream
from twinloop.training.weights import get_weights, load_decoder, new_decoder

CONFIG = TINY.model_copy(update={"attention_bias": True, "num_hidden_layers": 2})
FORM = AdapterForm(rank=3, alpha=12.0)
SETTINGS = TrainSettings(learning_rate=0.02)


def adapted(form=FORM, *, seed=0, config=CONFIG):
    model = new_decoder(config, seed=0)
    attach_adapter(model, form, seed=seed, stage="sft")
    return model


def moved(model, seed=5):
    """With an adapter as after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            if "lora_B" in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def logits_of(model, tokens=None):
    tokens = torch.arange(6, 46)[None] if tokens is None else tokens
    with torch.no_grad():
        return model.logits(model.hidden(tokens, torch.arange(tokens.shape[1]).expand_as(tokens)))


def train(model, *, checkpoint_dir=None, on_step=None, steps=7):
    stream = BatchStream(Texts().documents(40), seq_len=64, batch_size=4, seed=2, steps=steps)
    return run_training(
        model,
        CausalLMLoss(),
        stream,
        SETTINGS,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every_s=0.0,
        on_step=on_step,
    )


def test_training_learns_in_the_adapter_and_leaves_every_base_weight_as_it_was():
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = train(model, steps=20)
    assert result.loss < result.initial_loss - 0.1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {name for name in before if is_adapter_tensor(name)}
    assert not any(p.grad is not None for p in model.parameters())


def test_a_fresh_adapter_changes_nothing_and_is_another_one_in_another_stage():
    plain, model = new_decoder(CONFIG, seed=0), adapted()
    assert torch.equal(logits_of(model), logits_of(plain))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())
    again, other = adapted(), new_decoder(CONFIG, seed=0)
    attach_adapter(other, FORM, seed=0, stage="dpo")
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(model.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(model.state_dict()[name], other.state_dict()[name])
    assert model.state_dict()[name].abs().max() <= CONFIG.hidden_size**-0.5  # kaiming uniform, as PEFT's


def test_layers_with_a_rank_and_scale_of_their_own_keep_them():
    model = new_decoder(CONFIG, seed=0)
    names = ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    shapes = [model.get_submodule(name).weight.shape for name in names]
    factors = {
        name: (np.ones((rank, into), np.float32), np.ones((out, rank), np.float32))
        for name, rank, (out, into) in zip(names, (2, 3, 3), shapes, strict=True)
    }
    bind_adapter(model, Adapter(factors, 6.0, alphas={names[0]: 1.0}))
    found = adapter_of(model)
    assert found is not None
    assert [found.scale(name) for name in names] == [0.5, 2.0, 2.0]
    assert found.ranks == dict(zip(names, (2, 3, 3), strict=True))


def test_only_the_targets_are_adapted():
    model = adapted(replace(FORM, targets=("q_proj", "down_proj")))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trained_tensors(model)}
    assert names == {"q_proj", "down_proj"}


def test_muon_gets_neither_a_nor_b_and_the_state_is_adamws_alone():
    model = adapted()
    optimizer = build_optimizer(model, TrainSettings(learning_rate=0.1, optimizer="muon", weight_decay=0.5))
    for tensor in trained_tensors(model).values():
        tensor.grad = torch.zeros_like(tensor)
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    optimizer.step(0.1)
    state = optimizer.tensors()
    assert {name.rpartition("/")[0].removeprefix("adamw/") for name in state} == set(before)
    for name, tensor in trained_tensors(model).items():  # without a gradient only decay moves it
        torch.testing.assert_close(tensor.detach(), before[name] * 0.95)


@pytest.mark.parametrize("stabilised", [False, True])
def test_merged_is_the_adapter(tmp_path, stabilised):
    model = moved(adapted(replace(FORM, rank_stabilised=stabilised)))
    assert (logits_of(model) - logits_of(without_adapter(model))).abs().max() > 0.1
    save_model(tmp_path, CONFIG, get_weights(model))
    torch.testing.assert_close(logits_of(load_decoder(tmp_path)), logits_of(model), atol=1e-5, rtol=0)


def test_the_reference_is_the_base_with_the_adapter_off_in_the_same_memory():
    model = moved(adapted())
    reference = frozen_reference(model)
    assert torch.equal(logits_of(reference), logits_of(new_decoder(CONFIG, seed=0)))
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in reference.state_dict().values()} < mine
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained_tensors(moved(adapted())))
    whole = new_decoder(CONFIG, seed=0)
    assert without_adapter(whole) is whole
    copied = frozen_reference(whole).state_dict()
    assert not {t.data_ptr() for t in copied.values()} & {t.data_ptr() for t in whole.state_dict().values()}


def test_a_checkpoint_holds_the_adapter_and_its_moments_alone(tmp_path):
    model = adapted()
    train(model, checkpoint_dir=tmp_path)
    kept = checkpoint.latest(tmp_path).tensors
    assert {name.removeprefix("model/") for name in kept if name.startswith("model/")} == set(trained_tensors(model))
    moments = {name.split("/")[2] for name in kept if name.startswith("optimizer/")}
    assert moments == set(trained_tensors(model))


def test_stopped_in_any_step_it_resumes_bit_for_bit(tmp_path):
    whole = adapted()
    train(whole)
    for step in (1, 4, 7):
        with pytest.raises(StoppedError):
            train(adapted(), checkpoint_dir=tmp_path / str(step), on_step=stop_at(step))
        resumed = adapted()
        result = train(resumed, checkpoint_dir=tmp_path / str(step))
        assert result.resumed_from_step == (step - 1 or None)
        assert all(torch.equal(t, whole.state_dict()[name]) for name, t in resumed.state_dict().items())


# --- methods ----------------------------------------------------------------------------------------------------------

TOKENIZER = SimpleNamespace(
    encode_prompt=lambda tokens: list(tokens),
    encode_answer=lambda tokens: list(tokens),
    decode=as_text,
    stop_id=5,
    stop_ids=(5,),
    vocab_size=CONFIG.vocab_size,
)
RUNTIME = Runtime(seed=3, threads=1)
DPO = dpo.Settings(learning_rate=0.01, batch_tokens=256, seq_len=64, epochs=3)
GRPO = grpo.Settings(
    learning_rate=0.01, steps=3, prompts_per_step=4, group_size=4, max_new_tokens=12, kl_coef=0.1, warmup_ratio=0.0
)
RECORDS = [{"prompt": [1, 8 + i], "chosen": [20 + i, 5], "rejected": [40 - i, 41, 5]} for i in range(9)]


def judging(reward):
    """A domain whose answers are rewarded by their length alone."""
    return SimpleNamespace(name="d", read_facts=lambda record: record, verify=lambda text, facts: reward(text))


def test_dpo_starts_at_ln_2_also_in_a_stage_on_top_of_another():
    for model in (adapted(), on_top_of(moved(adapted()))):
        reports = []
        objective, batches = dpo.build(RECORDS, model, TOKENIZER, DPO, RUNTIME, None)
        run_training(model, objective, batches, DPO, checkpoint_dir=None, on_step=reports.append)
        assert reports[0].loss == pytest.approx(np.log(2), abs=1e-6)
        assert reports[-1].loss < np.log(2) - 0.01


def on_top_of(model):
    """A network as the next stage loads it: the adapter merged, and a fresh one."""
    following = new_decoder(CONFIG, seed=0)
    following.load_state_dict({name: torch.from_numpy(array) for name, array in get_weights(model).items()})
    attach_adapter(following, FORM, seed=0, stage="next")
    return following


def test_dpo_resumed_keeps_the_reference_that_the_stage_started_from(tmp_path):
    def run(model, on_step=None, directory=None):
        objective, batches = dpo.build(RECORDS, model, TOKENIZER, DPO, RUNTIME, None)
        run_training(model, objective, batches, DPO, checkpoint_dir=directory, checkpoint_every_s=0.0, on_step=on_step)
        return model

    whole = run(adapted())
    with pytest.raises(StoppedError):
        run(adapted(), stop_at(2), tmp_path)
    resumed = run(adapted(), directory=tmp_path)
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in resumed.state_dict().items())


def test_the_first_ratio_of_grpo_is_one_on_the_engine_with_the_adapter_bound():
    """Every rollout, also those of an adapter that has moved: so the engine reads the trainer's own A and B."""
    model = adapted()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 8
        model.model.embed_tokens.weight[5] *= 3
    base = frozen_reference(copy.deepcopy(model))
    reports = []
    objective, rollouts = grpo.build(
        RECORDS, model, TOKENIZER, GRPO, RUNTIME, judging(lambda text: rewarded(float(len(text) < 6)))
    )
    run_training(model, objective, rollouts, GRPO, checkpoint_dir=None, on_step=reports.append)
    assert [report.step for report in reports] == [1, 2, 3]
    for report in reports:
        assert report.metrics["informative_groups"] > 0
        assert report.metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert report.metrics["logprob_gap_max"] < 1e-4
    assert reports[0].metrics["reference_kl"] == pytest.approx(0, abs=1e-9)
    assert reports[-1].metrics["reference_kl"] > 1e-5
    assert (logits_of(model) - logits_of(base)).abs().max() > 0.01


@pytest.mark.parametrize("form", [FORM, AdapterForm(5, 3.0, rank_stabilised=True, targets=("v_proj", "up_proj"))])
def test_the_engine_scores_as_the_network_with_its_adapter_and_follows_it(form):
    model = moved(adapted(form))
    engine = BoundSampler(model, max_length=48, prompts=1, group=1).engines[0]
    tokens = list(range(6, 46))
    for seed in (6, 7):
        torch.testing.assert_close(torch.from_numpy(engine.score(tokens)), logits_of(model)[0], atol=1e-4, rtol=0)
        moved(model, seed)
    sampler = BoundSampler(model, max_length=24, prompts=1, group=4)
    before = sampler.generate([[1, 2, 3]], SAMPLED, group=4)
    moved(model, seed=9)
    assert sampler.generate([[1, 2, 3]], SAMPLED, group=4) != before
