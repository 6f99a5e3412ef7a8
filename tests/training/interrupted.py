"""A training run to be killed: `python interrupted.py RUN CHECKPOINT_DIR STEPS`. Prints each finished step."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from small import TINY, Texts

from twinloop.training.heads import REWARD
from twinloop.training.loop import run_training
from twinloop.training.objectives import CausalLMLoss, RewardLoss
from twinloop.training.runtime import Runtime
from twinloop.training.settings import TrainSettings
from twinloop.training.stream import BatchStream
from twinloop.training.weights import new_decoder


def run(checkpoint_dir: Path, steps: int, on_step=None, checkpoint_every_s=0.0, optimizer="muon", device="cpu"):
    """Four steps an epoch, so that most runs are killed near an edge. Returns the weights."""
    model = new_decoder(TINY, seed=0)
    stream = BatchStream(Texts().documents(66), seq_len=64, batch_size=5, seed=2, steps=steps)
    assert stream.steps_per_epoch == 4
    settings = TrainSettings(learning_rate=0.01, optimizer=optimizer)
    result = run_training(
        model,
        CausalLMLoss(),
        stream,
        settings,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every_s=checkpoint_every_s,
        on_step=on_step,
        device=device,
    )
    return model, result


def run_reward(checkpoint_dir: Path, steps: int, on_step=None, checkpoint_every_s=0.0):
    """A reward model: the network with a head. Three steps an epoch."""
    model = new_decoder(TINY.model_copy(update={"labels": REWARD}), seed=0)
    stream = BatchStream(Texts().pairs(20), seq_len=64, batch_size=3, seed=2, steps=steps)
    assert stream.steps_per_epoch == 3
    options = {"checkpoint_dir": checkpoint_dir, "checkpoint_every_s": checkpoint_every_s, "on_step": on_step}
    return model, run_training(model, RewardLoss(), stream, TrainSettings(learning_rate=0.01), **options)


def run_ppo(checkpoint_dir: Path, steps: int, on_step=None, checkpoint_every_s=0.0):
    """Four steps a rollout: two epochs of two minibatches. The critic's head and the coefficient of the KL move too."""
    from test_ppo import network, settings, train  # the engine's libraries take seconds

    model, chosen = network(), settings(steps=steps, kl_target=0.5, kl_horizon=30)
    options = {"checkpoint_dir": checkpoint_dir, "checkpoint_every_s": checkpoint_every_s, "on_step": on_step}
    return model, train(model, chosen, **options)[1]


RUNS = {"documents": run, "reward": run_reward, "ppo": run_ppo}


if __name__ == "__main__":
    Runtime(seed=0, threads=1).use()
    RUNS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]), on_step=lambda report: print(report.step, flush=True))
