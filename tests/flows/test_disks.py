"""Disks that are full or read-only: one line that says so at every point, nothing lost, and all goes on later."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_project import make_project, start, twinloop, write_recipe

pytestmark = pytest.mark.slow

ENOUGH_FOR_A_RUN = 40 * 2**20


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, mount: Path):
        self.mount = mount
        self.filler = mount / "filler"

    def leave(self, free: int) -> None:
        """Fill all but so many bytes: the rest is then filled within milliseconds."""
        with self.filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.mount).free - free)

    def fill(self) -> None:
        """To the last byte."""
        descriptor = os.open(self.filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    os.write(descriptor, b"\0" * size)
            except OSError:
                continue
        os.close(descriptor)

    def empty(self) -> None:
        self.filler.unlink()

    def remount(self, rights: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{rights}", self.mount], check=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    mount = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", mount], check=False)
    if mounted.returncode:
        pytest.skip("a disk that can be filled needs the right to mount one")
    try:
        yield Disk(mount)
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.fixture(scope="module")
def project(disk: Disk) -> Path:
    (disk.mount / "project").mkdir()
    return make_project(disk.mount / "project")


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr of a command that failed as a user's mistake."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def run_until(project: Path, reached: Callable[[], bool], disk: Disk) -> subprocess.CompletedProcess[str]:
    """A run whose disk fills up when it comes to that point."""
    disk.leave(ENOUGH_FOR_A_RUN)
    process = start(project, "run", "recipes/small.yaml")
    while not reached():
        assert process.poll() is None, "it was over before the disk could be filled"
        time.sleep(0.001)
    disk.fill()
    stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess([], process.returncode, stdout, stderr)


def test_data_cannot_be_built_on_a_full_disk(project: Path, disk: Disk) -> None:
    disk.fill()
    try:
        assert "the disk is full" in one_line(twinloop(project, "data", "build"))
    finally:
        disk.empty()
    assert twinloop(project, "data", "build").returncode == 0


# In the order in which a run comes to them: each starts where the one before was stopped.
POINTS = {
    "Prefect's database": "state/prefect/prefect.db*",
    "MLflow's database": "mlruns",
    "the tokenizer": "artifacts/tokenize/.new/*",
    "a checkpoint": "artifacts/pretrain/.work/*/checkpoints/*",
    "placing an artifact": "artifacts/sft/.new/*/model.safetensors",
    "the export": "artifacts/export/.new/*/*",
    "registration": "mlruns/artifacts/small/models/*",
}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_on_a_disk_that_fills_up_says_so_in_one_line(project: Path, disk: Disk, point: str) -> None:
    try:
        done = run_until(project, lambda: bool(list(project.glob(POINTS[point]))), disk)
    finally:
        disk.empty()
    assert re.search(r"the disk is full.* a run of recipes/small\.yaml writes about \d+ MiB", one_line(done))


def test_with_room_again_it_ships(project: Path) -> None:
    done = twinloop(project, "run", "recipes/small.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(project.glob("artifacts/*/.work/*"))
    status = twinloop(project, "status", "--model", "small")
    assert "champion   version" in status.stdout
    assert "warning" not in status.stdout


def test_a_document_that_a_full_disk_does_not_take_is_not_found(project: Path, disk: Disk) -> None:
    disk.fill()
    try:
        for days in range(10, 60):  # the file's last block may hold some
            text = f"damaged items reported within {days} days are eligible."
            put = twinloop(project, "documents", "put", "P-7", text, "--model", "small")
            if put.returncode:
                break
        assert "the disk is full" in one_line(put)
    finally:
        disk.empty()
    assert text not in twinloop(project, "documents", "list", "--model", "small").stdout
    assert twinloop(project, "documents", "put", "P-7", text, "--model", "small").returncode == 0
    assert text in twinloop(project, "documents", "list", "--model", "small").stdout


@pytest.fixture(scope="module")
def two_champions(project: Path) -> Path:
    """The project with a second champion, so that there is a way back."""
    write_recipe(project, sft={"learning_rate": 0.002})
    done = twinloop(project, "run", "recipes/small.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


READ_ONLY = {
    "run": ["run", "recipes/small.yaml"],
    "rollback": ["rollback", "--model", "small"],
    "gate": ["gate", "recipes/small.yaml"],
    "promote": ["promote", "1", "--model", "small"],
    "documents put": ["documents", "put", "P-7", "damaged items within 8 days are eligible.", "--model", "small"],
}


@pytest.mark.parametrize("command", READ_ONLY)
def test_a_read_only_disk_is_named_in_one_line(two_champions: Path, disk: Disk, command: str) -> None:
    disk.remount("ro")
    try:
        said = one_line(twinloop(two_champions, *READ_ONLY[command]))
    finally:
        disk.remount("rw")
    assert "Read-only file system" in said
    assert str(two_champions) in said


def test_a_rollback_that_the_disk_stops_moves_the_champion_once(two_champions: Path, disk: Disk) -> None:
    ledger = two_champions / "mlruns" / "promotions.jsonl"
    before = ledger.stat().st_size
    process = start(two_champions, "rollback", "--model", "small")
    while ledger.stat().st_size == before:
        assert process.poll() is None
        time.sleep(0.0002)
    disk.fill()
    stdout, stderr = process.communicate(timeout=200)
    try:
        if process.returncode:  # else it was over before the disk was full
            assert "the disk is full" in one_line(subprocess.CompletedProcess([], process.returncode, stdout, stderr))
    finally:
        disk.empty()
    again = twinloop(two_champions, "rollback", "--model", "small")
    if process.returncode:
        assert again.returncode == 0, again.stderr
        assert "had been interrupted" in again.stdout
    else:
        assert "nothing to roll back to" in again.stderr
    assert "rollback to version" in twinloop(two_champions, "status", "--model", "small").stdout
