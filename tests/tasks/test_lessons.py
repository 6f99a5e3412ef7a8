"""What stages learn is a matter of torch alone."""

from __future__ import annotations

import subprocess
import sys


def test_lessons_and_the_benchmarks_on_them_need_neither_orchestration_nor_tracking():
    """They run on a bare device: one with torch and ONNX Runtime, without Prefect, MLflow, DVC and polars."""
    program = """
import sys
for name in ("prefect", "mlflow", "dvc", "polars", "pandera"):
    sys.modules[name] = None  # an import raises
import twinloop.tasks.lessons.pretrain, tasks.lessons.sft, tasks.lessons.dpo, tasks.lessons.rlvr, tasks.learn
import benchmarks.__main__, benchmarks.lifecycle
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
