"""Training checkpoints: one safetensors file each, its metadata a JSON document. Never pickle.

A file is written beside its place, synced and renamed, so a name that exists is whole. Its digest is checked on
reading all the same, since disks also lie; the newest good one wins, and one older is kept for that case.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twinloop.common.files import fsync

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """step: optimizer steps done. tensors: on CPU, by name. state: what JSON holds."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whole or not at all; returns its path. Older ones past KEEP go."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    state = json.dumps(checkpoint.state)
    metadata = {"step": str(checkpoint.step), "state": state, "digest": _digest(tensors, state)}
    path = directory / f"step-{checkpoint.step:08d}.safetensors"
    beside = directory / f".{path.name}.{os.getpid()}"
    save_file(tensors, beside, metadata)
    fsync(beside)
    beside.rename(path)
    fsync(directory)
    for old in _newest_first(directory)[KEEP:]:
        old.unlink()
    for abandoned in directory.glob(".step-*"):  # of a process that was killed while it wrote
        abandoned.unlink()
    return path


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose digest holds, or None."""
    for path in _newest_first(directory):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if metadata.get("digest") == _digest(tensors, metadata["state"]):
                return Checkpoint(int(metadata["step"]), tensors, json.loads(metadata["state"]))
        except (SafetensorError, OSError, KeyError, ValueError):
            continue
    return None


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.safetensors"), reverse=True)


def _digest(tensors: Mapping[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
