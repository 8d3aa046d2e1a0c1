"""How much memory this process may still take: what the machine has, within what its control groups allow."""

from __future__ import annotations

from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes that can be had without swapping, as the kernel estimates it, and that no control group forbids."""
    return max(0, min(_machine(proc), *_groups(proc, cgroup)))


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
