"""How much memory this process may still take, what the machine has within what its control groups allow; and giving
back what is free.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of glibc's mallopt; its threshold for mapping rises by itself to at most this, and that for trimming to twice as much.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST = -1, -3, 32 << 20
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes that can be had without swapping, as the kernel estimates it, and that no control group forbids."""
    return max(0, min(_machine(proc), *_groups(proc, cgroup)))


@contextmanager
def without_holes() -> Iterator[None]:
    """While large pieces of memory are made and let go of in turns: each has pages of its own, which the machine has
    back at once; among smaller ones they would leave holes that nothing fits into. Afterwards the C library goes on as
    it does in a process that has run for a while. Only where that is glibc.
    """
    _set(_MMAP_THRESHOLD, 256 << 10)
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _MOST)
        _set(_TRIM_THRESHOLD, 2 * _MOST)
        give_back()


def give_back() -> None:
    """What is free inside this process goes back to the machine."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)


def _machine(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc}/meminfo does not say MemAvailable")


def _groups(proc: Path, root: Path) -> list[int]:
    """What is left in each group around this process that has a limit; inside a container its own group is the root."""
    found = [1 << 62]
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (left := _left(folder, *names)) is not None:
                found.append(left)
    return found


def _left(group: Path, limit: str, used: str, cached: str) -> int | None:
    """None where the group has no limit. Pages of files that nobody has used for a while give way."""
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(most) - int((group / used).read_text()) + next((int(row[1]) for row in rows if row[0] == cached), 0)
    except (OSError, ValueError, IndexError):
        return None
