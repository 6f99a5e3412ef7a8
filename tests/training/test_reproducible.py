"""What is switched on for CUDA is switched back afterwards, as it was, also when one use lies in another."""

import os

import pytest
import torch

from twinloop.training.reproducible import reproducible

CUDA = torch.device("cuda")


def switches():
    memory = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )


def test_a_reference_scored_within_training_leaves_training_reproducible(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = switches()
    with reproducible(CUDA):
        within = switches()
        assert within == (True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(ValueError, match="stop"), reproducible(CUDA):
            raise ValueError("stop")
        assert switches() == within
    assert switches() == before


def test_on_cpu_nothing_is_switched():
    before = switches()
    with reproducible(torch.device("cpu")):
        assert switches() == before
