"""What answers earn: the verifier, a reward model, and their weighted sum, in GRPO and PPO alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reward_scores import reward_scores
from test_methods import RECORDS, Parity
from test_rollouts import rewarded

from twinloop.common.errors import UserError
from twinloop.models.directory import load_config, save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.training.heads import REWARD, attach_head
from twinloop.training.loop import run_training
from twinloop.training.method import load_method
from twinloop.training.rewards import Answer, Earned, RewardModel, Verifier, WeightedSum, prompts_and_rewards
from twinloop.training.runtime import Runtime
from twinloop.training.settings import NamedModel, RolloutSettings
from twinloop.training.weights import get_weights, new_decoder

RUNTIME = Runtime(seed=1, threads=1)
ROLLOUTS = {"learning_rate": 0.01, "steps": 2, "prompts_per_step": 4, "max_new_tokens": 8}
PROMPTS = [record["prompt"] for record in RECORDS["prompts"]]
ANSWERS = [Answer(0, "it is 0", True), Answer(0, "no", True), Answer(3, "it is", False), Answer(5, "", True)]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_tokenizer((str(rows) for rows in RECORDS.values()), 300)


@pytest.fixture
def network(tiny, tokenizer: ChatTokenizer):
    return new_decoder(tiny.config.model_copy(update={"vocab_size": tokenizer.vocab_size}), seed=0)


@pytest.fixture
def reward_model(tmp_path: Path, network, tokenizer: ChatTokenizer) -> Path:
    """Of the same network, with a head that scores at random."""
    attach_head(network, REWARD, tokenizer, ends=tokenizer.stop_ids)
    with torch.no_grad():
        network.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_model(tmp_path / "reward", network.config, get_weights(network), tokenizer)
    return tmp_path / "reward"


def test_the_verifier_alone_gives_its_verdicts_and_nothing_else_is_reported() -> None:
    judge = WeightedSum({"verifier": (Verifier(lambda prompt, text: rewarded(len(text) / 8, parsed=bool(text))), 1.0)})
    assert judge(ANSWERS) == [Earned(7 / 8), Earned(2 / 8), Earned(5 / 8), Earned(0.0, parsed=False)]


def test_several_sources_are_summed_by_weight_and_each_is_reported_before_its_weight() -> None:
    def by_prompt(answers):
        return [Earned(float(answer.prompt)) for answer in answers]

    verifier = Verifier(lambda prompt, text: rewarded(float(len(text) > 2), parsed=bool(text)))
    earned = WeightedSum({"verifier": (verifier, 2.0), "model_reward": (by_prompt, 0.5)})(ANSWERS)
    assert [each.reward for each in earned] == [2.0, 0.0, 3.5, 2.5]
    assert earned[2].parts == {"verifier": 1.0, "model_reward": 3.0}
    assert [each.parsed for each in earned] == [True, True, True, False]


@pytest.mark.parametrize("verifier", [[], [{"verifier": 1.0}]])
def test_further_reward_models_go_by_their_number(
    verifier: list[dict[str, float]], reward_model: Path, tokenizer: ChatTokenizer
) -> None:
    other = shutil.copytree(reward_model, reward_model.with_name("other"))
    rewards = [*verifier, {"model": str(reward_model)}, {"model": str(other)}]
    settings = RolloutSettings.model_validate(ROLLOUTS | {"rewards": rewards})
    _, judge = prompts_and_rewards(RECORDS["prompts"], tokenizer, settings, RUNTIME, Parity())
    assert {"model_reward", "model_reward_2"} == judge(ANSWERS)[0].parts.keys() - {"verifier"}


def test_a_reward_model_reads_what_it_was_trained_on(reward_model: Path, tokenizer: ChatTokenizer) -> None:
    """Prompt and answer under its template, the stop token behind what ended by itself; alone or beside others."""
    texts = []
    for answer in ANSWERS:
        tokens = tokenizer.encode_answer(answer.text)
        texts.append(tokenizer.encode_prompt(PROMPTS[answer.prompt]) + (tokens if answer.finished else tokens[:-1]))
    expected = reward_scores(reward_model, texts)
    assert np.unique(expected).size == len(expected)
    found = [each.reward for each in RewardModel(reward_model, PROMPTS, RUNTIME)(ANSWERS)]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_answer_that_the_template_cannot_follow_is_scored_as_it_is(reward_model: Path) -> None:
    """A sample may hold what the template splits at, such as `</think>`: one of them ended the whole run."""
    place = reward_model / "tokenizer_config.json"
    settings = json.loads(place.read_text())
    split = settings["chat_template"].replace("message['content']", "message['content'].split('</think>')[-1]")
    assert split != settings["chat_template"]
    place.write_text(json.dumps(settings | {"chat_template": split}))
    tokenizer = ChatTokenizer.load(reward_model)
    with pytest.raises(UserError, match="chat template"):
        tokenizer.encode_answer("it is</think> 0")
    asked, text = tokenizer.encode_prompt(PROMPTS[0]), tokenizer.encode("it is</think> 0")
    answered = [*PROMPTS[0], {"role": "assistant", "content": "it is</think> 0"}]
    assert tokenizer.encode_answered(answered) == [*asked, *text, tokenizer.stop_id], "where it is served too"
    expected = reward_scores(reward_model, [[*asked, *text, tokenizer.stop_id], [*asked, *text]])
    sampled = [Answer(0, "it is</think> 0", finished) for finished in (True, False)]
    assert [each.reward for each in RewardModel(reward_model, PROMPTS, RUNTIME)(sampled)] == pytest.approx(
        expected.tolist(), abs=1e-5
    )


def test_an_answer_longer_than_a_reward_model_reads_scores_as_one_that_was_cut_off(reward_model: Path) -> None:
    """Its text may have more tokens than were sampled, such as the name of one special token."""
    tokenizer, positions = ChatTokenizer.load(reward_model), load_config(reward_model).max_position_embeddings
    read = [*tokenizer.encode_prompt(PROMPTS[0]), *tokenizer.encode("it is " * 2000)][:positions]
    (found,) = RewardModel(reward_model, PROMPTS, RUNTIME)([Answer(0, "it is " * 2000, True)])
    assert found.reward == pytest.approx(reward_scores(reward_model, [read])[0], abs=1e-5)


def test_a_prompt_longer_than_a_reward_model_reads_is_reported(reward_model: Path) -> None:
    prompts = [[{"role": "user", "content": "it is " * 2000}]]
    with pytest.raises(UserError, match=r"takes \d+ tokens, and a prompt has \d+; train the reward model on a longer"):
        RewardModel(reward_model, prompts, RUNTIME)([Answer(0, "no", True)])


def test_a_model_that_writes_text_is_no_reward_model(tmp_path: Path, network, tokenizer: ChatTokenizer) -> None:
    save_model(tmp_path, network.config, get_weights(network), tokenizer)
    with pytest.raises(UserError, match="is no reward model"):
        RewardModel(tmp_path, PROMPTS, RUNTIME)


def test_without_the_verifier_the_domain_is_not_asked(reward_model: Path, tokenizer: ChatTokenizer) -> None:
    settings = RolloutSettings.model_validate(ROLLOUTS | {"rewards": [{"model": str(reward_model)}]})
    assert not settings.needs_verifier()
    prompts, judge = prompts_and_rewards(RECORDS["prompts"], tokenizer, settings, RUNTIME, domain=None)  # type: ignore[arg-type]
    assert prompts == [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    assert all(each.parts == {} for each in judge(ANSWERS))


@pytest.mark.parametrize(("name", "more"), [("grpo", {"group_size": 4}), ("ppo", {"group_size": 2, "epochs": 2})])
def test_rl_learns_from_both_and_reports_each(
    name: str, more: dict[str, int], reward_model: Path, tiny, tokenizer: ChatTokenizer
) -> None:
    method = load_method(name, Path.cwd())
    rewards = [{"verifier": 1.0}, {"model": "reward", "weight": 0.3}]
    settings = method.settings.model_validate(ROLLOUTS | more | {"rewards": rewards})
    assert settings.named_models() == {"rewards[1].model": NamedModel({"stage": "reward"}, kind="reward")}
    placed = settings.with_models({"rewards[1].model": reward_model})
    policy = new_decoder(tiny.config.model_copy(update={"vocab_size": tokenizer.vocab_size}), seed=0)
    before = policy.model.embed_tokens.weight.detach().clone()
    built = method.build(RECORDS["prompts"], policy, tokenizer, placed, RUNTIME, Parity())
    reports = []
    run_training(policy, *built, placed, checkpoint_dir=None, on_step=reports.append)
    metrics = reports[0].metrics
    assert metrics["reward"] == pytest.approx(metrics["verifier"] + 0.3 * metrics["model_reward"])
    assert metrics["model_reward"] != 0
    assert not torch.equal(policy.model.embed_tokens.weight, before)
