"""What the key of a training stage is made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twinloop.tasks.recipe import TrainStage
from twinloop.tasks.train import train
from twinloop.training.method import load_method
from twinloop.training.runtime import Runtime
from twinloop.training.settings import TrainSettings

OWN = "from twinloop.training.methods.sft import RECORDS, Settings, build\n"


@pytest.mark.parametrize(("name", "expected"), [("sft", False), ("grpo", True), ("./own.py", True), ("mine.own", True)])
def test_the_domains_code_is_in_the_key_wherever_it_may_change_the_training(
    name: str, expected: bool, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    for path in ("own.py", "mine/own.py", "mine/__init__.py"):
        (tmp_path / path).write_text(OWN)
    said: dict[str, Any] = {}
    context = SimpleNamespace(project=tmp_path, run=lambda *_, **settings: said.update(settings))
    stage = TrainStage("own", load_method(name, tmp_path), TrainSettings(learning_rate=1.0), "train[0]")
    train.fn(context, stage, Runtime(seed=1, threads=1, device="cpu"), data="d", model="m", audit="a")  # type: ignore[arg-type]
    assert said["uses_domain"] is expected
