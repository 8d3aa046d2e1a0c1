"""What may still be taken of memory: by the machine, and by every control group around the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.engine.memory import available_bytes

GB = 1 << 30


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", f"MemTotal: {9 * GB // 1024} kB\nMemAvailable: {6 * GB // 1024} kB")
    write(tmp_path / "proc/self/cgroup", "0::/")
    return tmp_path / "proc"


def test_without_groups_it_is_what_the_machine_has(proc: Path, tmp_path: Path) -> None:
    assert available_bytes(proc, tmp_path / "cgroup") == 6 * GB
    (proc / "self/cgroup").unlink()
    assert available_bytes(proc, tmp_path / "cgroup") == 6 * GB


def test_a_group_around_the_processs_own_counts(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/cgroup", "0::/pod/box")
    pod, box = tmp_path / "cgroup/pod", tmp_path / "cgroup/pod/box"
    write(box / "memory.max", "max")
    write(pod / "memory.max", 4 * GB)
    write(pod / "memory.current", 3 * GB)
    write(pod / "memory.stat", f"anon 5\ninactive_file {GB}")
    assert available_bytes(proc, tmp_path / "cgroup") == 2 * GB
    write(pod / "memory.current", 9 * GB)
    assert available_bytes(proc, tmp_path / "cgroup") == 0


def test_groups_of_the_first_version_and_of_a_container_whose_own_path_is_not_to_be_seen(
    proc: Path, tmp_path: Path
) -> None:
    write(proc / "self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/")
    top = tmp_path / "cgroup/memory"
    write(top / "memory.limit_in_bytes", 2 * GB)
    write(top / "memory.usage_in_bytes", GB)
    write(top / "memory.stat", "total_inactive_file 4096")
    assert available_bytes(proc, tmp_path / "cgroup") == GB + 4096


def test_this_machine_has_some() -> None:
    assert 0 < available_bytes() < 1 << 50
