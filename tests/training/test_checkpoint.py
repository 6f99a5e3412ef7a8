"""Checkpoints on disk: whole, checked, and never pickled."""

import torch

from twinloop.training import checkpoint
from twinloop.training.checkpoint import Checkpoint


def write(folder, step):
    return checkpoint.save(folder, Checkpoint(step, {"w": torch.full((3,), float(step))}, {"position": step}))


def test_newest_checkpoint_comes_back_as_it_was(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2, 10):
        write(tmp_path, step)
    found = checkpoint.latest(tmp_path)
    assert (found.step, found.state) == (10, {"position": 10})
    assert torch.equal(found.tensors["w"], torch.full((3,), 10.0))


def test_last_good_one_is_kept_and_older_ones_go(tmp_path):
    for step in range(5):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003.safetensors",
        "step-00000004.safetensors",
    ]


def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    content = bytearray(newest.read_bytes())
    for corrupt in (content[:-1] + bytes([content[-1] ^ 1]), content[: len(content) // 2], b""):
        newest.write_bytes(corrupt)
        assert checkpoint.latest(tmp_path).step == 1


def test_half_written_one_is_never_chosen_and_is_cleared_away(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".step-00000002.safetensors.4242").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).step == 1
    write(tmp_path, 3)
    assert not list(tmp_path.glob(".step-*"))
