"""The loop: killed and resumed is the same as never stopped."""

import math
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted import RUNS, run

from twinloop.common.errors import UserError
from twinloop.training import checkpoint
from twinloop.training.loop import run_training
from twinloop.training.objectives import CausalLMLoss
from twinloop.training.settings import TrainSettings
from twinloop.training.stream import BatchStream
from twinloop.training.tree import document
from twinloop.training.weights import new_decoder


class StoppedError(Exception):
    pass


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def stop_at(step):
    def on_step(report):
        if report.step == step:
            raise StoppedError

    return on_step


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_training_resumes_bit_for_bit(tmp_path, name):
    """kill -9 at random moments, of a process that does little but write checkpoints, until it has finished."""
    steps, kills, moments = 200, 0, random.Random(0)
    while True:
        command = [sys.executable, Path(__file__).with_name("interrupted.py"), name, tmp_path / "killed", str(steps)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            survive = moments.randrange(30, 80)
            for _ in range(survive):
                if not process.stdout.readline():
                    break
            process.send_signal(signal.SIGKILL)
            # what the pipe still held was finished before the kill
            process.stdout.read()
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
    assert process.returncode == 0
    assert kills >= 2
    found = checkpoint.latest(tmp_path / "killed")
    uninterrupted, result = RUNS[name](tmp_path / "whole", steps, checkpoint_every_s=math.inf)
    assert found.step == steps == result.steps
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(found.tensors[f"model/{name}"], tensor), name
    whole = checkpoint.latest(tmp_path / "whole").tensors
    assert found.tensors.keys() == whole.keys()
    for name in whole.keys() - {"rng/cpu"}:  # of an objective and of the optimizer too; no draw of torch is used
        assert torch.equal(found.tensors[name], whole[name]), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopped_after_any_step_training_resumes_bit_for_bit(tmp_path, optimizer):
    """Nine steps are two epochs and a quarter: every step is tried, the epochs' edges among them."""
    whole, _ = run(tmp_path / "whole", 9, optimizer=optimizer)
    for step in range(1, 10):
        with pytest.raises(StoppedError):
            run(tmp_path / f"at-{step}", 9, on_step=stop_at(step), optimizer=optimizer)
        resumed, result = run(tmp_path / f"at-{step}", 9, optimizer=optimizer)
        assert result.resumed_from_step == (step - 1 or None)
        assert same_weights(resumed, whole), f"stopped in step {step}"


def test_where_checkpoints_fell_changes_nothing(tmp_path):
    often, _ = run(tmp_path / "often", 9)
    never, _ = run(None, 9)
    assert same_weights(often, never)


def test_finished_training_is_not_repeated(tmp_path):
    first, _ = run(tmp_path, 9)
    seen = []
    second, result = run(tmp_path, 9, on_step=seen.append)
    assert seen == []
    assert same_weights(first, second)
    assert result.resumed_from_step == result.steps == 9
    assert result.tokens > 0


def test_another_plans_checkpoint_is_refused(tmp_path):
    run(tmp_path, 9)
    with pytest.raises(UserError, match="made for 9 steps, now there are 12"):
        run(tmp_path, 12)


def test_loss_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(tmp_path, tiny, texts):
    with torch.no_grad():
        tiny.model.norm.weight[0] = math.nan
    stream = BatchStream(texts.documents(9), seq_len=64, batch_size=2, seed=0, epochs=1)
    with pytest.raises(UserError, match=r"loss is nan at step 1; lower learning_rate \(now 0.1\)"):
        run_training(tiny, CausalLMLoss(), stream, TrainSettings(learning_rate=0.1), checkpoint_dir=tmp_path)
    assert checkpoint.latest(tmp_path) is None


def test_a_step_in_which_nothing_is_scored_makes_no_nan_and_moves_nothing(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    stream = BatchStream([document([7])], seq_len=16, batch_size=1, seed=0, epochs=2)
    reports = []
    run_training(
        tiny, CausalLMLoss(), stream, TrainSettings(learning_rate=0.1), checkpoint_dir=None, on_step=reports.append
    )
    assert [(report.loss, report.grad_norm) for report in reports] == [(0.0, 0.0)] * 2
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())


def test_reports_say_where_the_run_stands(texts, tiny):
    reports = []
    stream = BatchStream(texts.documents(30), seq_len=64, batch_size=4, seed=0, epochs=2)
    result = run_training(
        tiny, CausalLMLoss(), stream, TrainSettings(learning_rate=0.01), checkpoint_dir=None, on_step=reports.append
    )
    assert [report.step for report in reports] == list(range(1, stream.total_steps + 1))
    assert reports[-1].loss < reports[0].loss
    assert (result.initial_loss, result.loss) == (reports[0].loss, reports[-1].loss)
    assert (
        result.tokens
        == sum(report.tokens for report in reports)
        == 2 * sum(tree.length for row in stream.packing.rows for tree in row)
    )
    assert all(report.grad_norm > 0 and report.seconds.compute > 0 for report in reports)


def test_untrained_networks_are_the_same_for_the_same_seed(tiny):
    torch.manual_seed(99)
    assert same_weights(tiny, new_decoder(tiny.config, seed=0))
    assert not same_weights(tiny, new_decoder(tiny.config, seed=1))


def test_the_last_checkpoint_counts_as_time(tmp_path, texts, tiny):
    stream = BatchStream(texts.documents(20), seq_len=32, batch_size=2, seed=0, steps=2)
    settings = TrainSettings(learning_rate=0.01)
    result = run_training(tiny, CausalLMLoss(), stream, settings, checkpoint_dir=tmp_path, checkpoint_every_s=math.inf)
    assert result.seconds.checkpoint > 0
