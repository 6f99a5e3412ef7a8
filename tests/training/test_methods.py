"""A method is one file: every stage of training, its checks and its plan take what they need from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import padded

from twinloop.common.errors import UserError
from twinloop.common.modules import FoundModule
from twinloop.domains.domain import Domain, Message, Verdict
from twinloop.models.directory import save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.tokenizer import ChatTokenizer
from twinloop.registry.fingerprint import module_fingerprint
from twinloop.training.loop import run_training
from twinloop.training.method import Method, load_method, ready_made
from twinloop.training.runtime import Runtime
from twinloop.training.weights import get_weights, new_decoder

PROJECT = Path(__file__).parents[2]

SMOOTHED = '''"""SFT with label smoothing (Szegedy et al., 2016): some of a target's weight goes to all tokens."""

from twinloop.training.settings import EpochSettings, Share

RECORDS = "chat"
SHOWN = ("likelihood",)


class Settings(EpochSettings):
    smoothing: Share = 0.1


def build(records, model, tokenizer, settings, runtime, domain):
    import torch

    from twinloop.training.methods import sft
    from twinloop.training.tree import attention_plan

    class SmoothedLoss:
        def normaliser(self, batch):
            return batch.total_weight

        def loss(self, model, batch):
            hidden_BLD = model.hidden(batch.tokens_BL, batch.positions_BL, attention_plan(batch))
            hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, batch.predict_from_N)
            logprobs_NV = model.logits(hidden_ND).float().log_softmax(-1)
            target_N = logprobs_NV.gather(1, batch.target_N[:, None])[:, 0]
            mixed_N = (1 - settings.smoothing) * target_N + settings.smoothing * logprobs_NV.mean(-1)
            mean = (target_N.detach() * batch.weight_N).sum() / batch.total_weight
            return -(mixed_N * batch.weight_N).sum() / batch.total_weight, {"likelihood": mean.exp()}

    _, batches = sft.build(records, model, tokenizer, settings, runtime, domain)
    return SmoothedLoss(), batches
'''


@pytest.fixture
def smoothed(tmp_path: Path) -> Method:
    (tmp_path / "smoothed.py").write_text(SMOOTHED)
    return load_method("./smoothed.py", tmp_path)


def chat(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


RECORDS = {
    "chat": [{"messages": chat(f"say {n}", f"it is {n}")} for n in range(40)],
    "corpus": [{"text": f"number {n} comes before number {n + 1}. " * 4} for n in range(40)],
    "preferences": [{"prompt": chat(f"say {n}", "")[:1], "chosen": f"it is {n}", "rejected": "no"} for n in range(40)],
    "prompts": [{"prompt": chat(f"say {n}", "")[:1], "facts": n} for n in range(8)],
}
PACKED = {"learning_rate": 0.01, "batch_tokens": 256, "seq_len": 128}
SETTINGS = {
    "pretrain": PACKED | {"tokens": 2048},
    "sft": PACKED | {"epochs": 2},
    "dpo": PACKED | {"epochs": 2},
    "reward": PACKED | {"epochs": 2},
    "classify": PACKED | {"epochs": 8},
    "distil": PACKED | {"epochs": 2, "top_k": 8},
    "grpo": {"learning_rate": 0.01, "steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8},
    "ppo": {"learning_rate": 0.01, "steps": 4, "prompts_per_step": 8, "max_new_tokens": 8, "epochs": 2},
    "smoothed": PACKED | {"epochs": 4, "smoothing": 0.2},
}


class Parity(Domain):
    """Pays answers of an even length. Its prompts are of numbers, which are even or not."""

    labels = ("even", "odd")

    def gold(self, facts: int) -> str:
        return self.labels[facts % 2]

    def verify(self, output: str, facts: int) -> Verdict:
        return Verdict.of({"even": len(output) % 2 == 0}, output=output)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return train_tokenizer((json.dumps(rows) for rows in RECORDS.values()), 300)


def run(method: Method, tiny, tokenizer: ChatTokenizer, **changes: object):
    """A short training with the method, from the same weights."""
    model = new_decoder(tiny.config.model_copy(update={"vocab_size": tokenizer.vocab_size}), seed=0)
    settings = method.settings.model_validate(SETTINGS[method.name] | changes)
    runtime = Runtime(seed=1, threads=1)
    built = method.build(RECORDS[method.records], model, tokenizer, settings, runtime, Parity())
    return model, run_training(model, *built, settings, checkpoint_dir=None)


def write_teacher(folder: Path, tiny, tokenizer: ChatTokenizer) -> Path:
    config = tiny.config.model_copy(update={"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1})
    save_model(folder, config, get_weights(new_decoder(config, seed=7)), tokenizer)
    return folder


METHODS = ["pretrain", "sft", "dpo", "distil", "grpo", "ppo", "reward", "classify"]


@pytest.mark.parametrize("name", METHODS)
def test_every_ready_made_method_trains(name: str, tiny, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    assert set(ready_made()) == set(METHODS)
    named = {"teacher": {"path": str(write_teacher(tmp_path, tiny, tokenizer))}} if name == "distil" else {}
    _, result = run(load_method(name, PROJECT), tiny, tokenizer, **named)
    assert result.steps >= 2
    assert result.tokens > 0
    if name not in ("grpo", "ppo"):
        assert result.loss < result.initial_loss


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_at_most_80_lines_of_code(name: str) -> None:
    lines = load_method(name, PROJECT).found.file.read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 80


def test_a_method_of_ones_own_is_one_file(smoothed: Method, tiny, tokenizer: ChatTokenizer) -> None:
    assert sum(bool(line.strip()) for line in SMOOTHED.splitlines()) <= 80
    assert (smoothed.name, smoothed.records, smoothed.needs_verifier) == ("smoothed", "chat", False)
    model, result = run(smoothed, tiny, tokenizer)
    assert result.loss < result.initial_loss
    assert 0 < result.metrics["likelihood"] < 1
    other, _ = run(smoothed, tiny, tokenizer, smoothing=0.0)
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_without_smoothing_it_is_sft(smoothed: Method, tiny, tokenizer: ChatTokenizer) -> None:
    _, ours = run(smoothed, tiny, tokenizer, smoothing=0.0, epochs=2)
    _, sft = run(load_method("sft", PROJECT), tiny, tokenizer)
    assert ours.loss == pytest.approx(sft.loss, abs=1e-4)


def test_sft_trains_every_answer_of_a_conversation(tiny, tokenizer: ChatTokenizer) -> None:
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"text {n}"} for n, role in enumerate(roles)]
    sft = load_method("sft", PROJECT)
    settings = sft.settings.model_validate(SETTINGS["sft"])
    _, batches = sft.build([{"messages": messages}], tiny, tokenizer, settings, Runtime(seed=1, threads=1), Parity())
    (batch,) = batches.next().micro_batches
    answers = [*tokenizer.encode_answer("text 1"), *tokenizer.encode_answer("text 3")]
    assert batch.target_N.tolist() == answers
    assert batch.num_tokens == sft.lengths({"messages": messages}, tokenizer).packed


def test_distillation_leaves_out_the_rows_that_no_token_has(tiny, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    distil, losses = load_method("distil", PROJECT), []
    config = tiny.config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    for rows in (0, 24):
        teacher, student = (padded(new_decoder(config, seed=seed), rows) for seed in (7, 0))
        save_model(tmp_path / str(rows), teacher.config, get_weights(teacher), tokenizer)
        settings = distil.settings.model_validate(SETTINGS["distil"] | {"teacher": {"path": str(tmp_path / str(rows))}})
        runtime = Runtime(seed=1, threads=1)
        objective, batches = distil.build(RECORDS["chat"], student, tokenizer, settings, runtime, Parity())
        losses.append(objective.loss(student, batches.next().micro_batches[0])[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_the_checks_and_the_plan_ask_has_defaults(smoothed: Method, tokenizer: ChatTokenizer) -> None:
    record = RECORDS["chat"][0]
    lengths = smoothed.lengths(record, tokenizer)
    assert lengths
    assert lengths.packed == lengths.path == len(tokenizer.encode_conversation(record["messages"]))
    assert smoothed.conversations(record) == [record["messages"]]
    settings = smoothed.settings.model_validate(SETTINGS["smoothed"])
    assert settings.shape(512) == (2, 128)
    assert not settings.has_reference()


def test_a_row_of_rollouts_is_a_prompt_with_all_its_answers() -> None:
    """What goes through the network at once, for the plan's memory; PPO's minibatches share a rollout's groups."""
    of_rollouts = {"learning_rate": 1e-3, "steps": 1, "prompts_per_step": 7, "group_size": 4, "max_new_tokens": 100}
    grpo, ppo = (load_method(name, PROJECT).settings for name in ("grpo", "ppo"))
    assert grpo.model_validate(of_rollouts).shape(512) == (7, 412 + 4 * 100)
    assert grpo.model_validate(of_rollouts | {"micro_batch_size": 2}).shape(512) == (2, 812)
    assert ppo.model_validate(of_rollouts | {"minibatches": 2}).shape(512) == (4, 812)


def test_a_changed_file_is_another_method(smoothed: Method, tmp_path: Path) -> None:
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "smoothed.py").write_text(SMOOTHED.replace("= 0.1", "= 0.2"))
    (tmp_path / "changed" / "commented.py").write_text("# a comment\n" + SMOOTHED)
    module = smoothed.found.module
    changed = FoundModule(module, tmp_path / "changed" / "smoothed.py")
    assert module_fingerprint(changed) != module_fingerprint(smoothed.found)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("RECORDS = 'chat'\n", "defines no Settings"),
        ("from pydantic import BaseModel as Settings\nRECORDS, build = 'chat', print\n", "Settings must derive"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
    ],
)
def test_a_module_that_is_no_method_is_reported_in_one_line(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(UserError, match=said) as raised:
        load_method("./broken.py", tmp_path)
    assert "\n" not in str(raised.value)


def test_methods_and_the_benchmarks_on_them_need_neither_orchestration_nor_tracking() -> None:
    """They run on a bare device: one with torch and ONNX Runtime, without Prefect, MLflow, DVC and polars."""
    program = """
import sys
for name in ("prefect", "mlflow", "dvc", "polars", "pandera"):
    sys.modules[name] = None  # an import raises
from pathlib import Path
from twinloop.training import loop, method, objectives, rollouts, scoring
for name in method.ready_made():
    method.load_method(name, Path())
import benchmarks.__main__, benchmarks.lifecycle
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
