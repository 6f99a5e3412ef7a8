"""One GPU job at a time, whoever starts it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small_project import environment

from twinloop.flows.gpu import gpu_slot
from twinloop.training.runtime import Runtime

GPU = Runtime(seed=1, threads=1, device="cuda")


def test_two_jobs_of_a_machine_take_turns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside = threading.Event()

    def second() -> None:
        with gpu_slot(tmp_path, GPU, shared=False):
            inside.set()

    with gpu_slot(tmp_path, GPU, shared=False):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not inside.wait(0.5)
    assert inside.wait(10)
    waiting.join()
    assert "another job of this project uses the GPU" in caplog.text


def test_a_job_without_a_gpu_waits_for_nobody(tmp_path: Path) -> None:
    cpu = Runtime(seed=1, threads=1, device="cpu")
    with gpu_slot(tmp_path, cpu, shared=True), gpu_slot(tmp_path, cpu, shared=True):
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_server_without_the_limit_is_reported_in_one_line(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from twinloop.flows.environment import prepare_environment
from twinloop.flows.server import embedded_server, wait_until_ready
project = Path({str(tmp_path)!r})
prepare_environment(project)
with embedded_server(project):
    wait_until_ready(project)
    from twinloop.flows.gpu import gpu_slot
    from twinloop.common.errors import UserError
    from twinloop.training.runtime import Runtime
    try:
        with gpu_slot(project, Runtime(seed=1, threads=1, device="cuda"), shared=True):
            print("inside")
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    [line] = done.stdout.splitlines()
    assert "prefect gcl create gpu --limit 1" in line
