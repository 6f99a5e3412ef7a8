"""ONNX Runtime keeps no queue for its maker, whichever of our modules a process begins with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

RUN = """
import importlib, sys
importlib.import_module(sys.argv[1])
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.zeros(1, numpy.float32)})
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", tensors[:1], tensors[1:])
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def files_written(first_import: str, model: Path, home: Path) -> set[str]:
    """What a process with `home` as its user's folder leaves there. Of the settings of this process it has no other
    than where the code is."""
    home.mkdir()
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment["HOME"] = str(home)
    subprocess.run([sys.executable, "-c", RUN, first_import, str(model)], env=environment, check=True)
    return {path.name for path in home.rglob("*") if path.is_file()}


def test_onnx_runtime_by_itself_writes_a_queue(model: Path, tmp_path: Path) -> None:
    assert "onnxruntime.db" in files_written("onnxruntime", model, tmp_path / "home")


@pytest.mark.parametrize(
    "first_import",
    [
        "twinloop.serving.engine",
        "twinloop.serving.engine.session",
        "twinloop.training.sampler",
        "twinloop.registry.champion",
        "twinloop.registry.pyfunc",
        "twinloop.flows.lifecycle",
    ],
)
def test_ours_writes_nothing(first_import: str, model: Path, tmp_path: Path) -> None:
    assert not {"onnxruntime.db", "deviceid"} & files_written(first_import, model, tmp_path / "home")
