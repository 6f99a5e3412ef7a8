"""What a process may still take is the least of the machine's memory and the limits of its cgroups."""

from __future__ import annotations

from pathlib import Path

import psutil

from twinloop.common.memory import available_bytes

GIB = 2**30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cgroup(folder: Path, limit: str, used: int, *, files: int = 0, version: int = 2) -> None:
    limit_file, used_file = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    prefix = {1: "total_", 2: ""}[version]
    write(folder / f"memory.{limit_file}", f"{limit}\n")
    write(folder / f"memory.{used_file}", f"{used}\n")
    write(folder / "memory.stat", f"anon 1\n{prefix}inactive_file {files // 2}\n{prefix}active_file {files // 2}\n")


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/user.slice\n")
    cgroup(tmp_path / "sys/fs/cgroup/user.slice", "max", GIB)
    for root in (tmp_path, tmp_path / "no cgroups"):
        assert 0.5 < available_bytes(root) / psutil.virtual_memory().available < 2


def test_the_least_limit_above_the_process_holds_and_droppable_pages_are_no_use_of_it(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/outer/inner\n")
    cgroup(tmp_path / "sys/fs/cgroup/outer", str(50_000_000), 40_000_000, files=30_000_000)
    cgroup(tmp_path / "sys/fs/cgroup/outer/inner", "max", 1)
    assert available_bytes(tmp_path) == 40_000_000
    cgroup(tmp_path / "sys/fs/cgroup/outer/inner", str(9_000_000), 2_000_000)
    assert available_bytes(tmp_path) == 7_000_000
    cgroup(tmp_path / "sys/fs/cgroup/outer/inner", str(1_000_000), 2_000_000)
    assert available_bytes(tmp_path) == 0


def test_the_first_version_of_cgroups_is_read_also_where_a_container_shows_only_its_own(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n")
    cgroup(tmp_path / "sys/fs/cgroup/memory", str(8_000_000), 5_000_000, files=2_000_000, version=1)
    assert available_bytes(tmp_path) == 5_000_000
