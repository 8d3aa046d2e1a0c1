"""Names of slabs, which outlive their kvstore: a fleet removes its own, and those of fleets that were killed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

SHM = Path("/dev/shm")
NAME = re.compile(r"headway-(\d+)-[0-9a-f]{8}")


def slab_name(owner_pid: int, unique: str) -> str:
    """`unique` is 8 hex digits."""
    return f"headway-{owner_pid}-{unique}"


def remove_slabs(names: Iterable[str]) -> None:
    """The segments of these names, and whatever else their kvstore has named after them."""
    for name in names:
        for path in SHM.glob(f"{name}*"):
            path.unlink(missing_ok=True)


def remove_stale_slabs() -> None:
    """Those whose owner (a Fleet's process) is dead."""
    owners = {path: NAME.match(path.name) for path in SHM.glob("headway-*")}
    remove_slabs(match[0] for match in owners.values() if match and not _alive(int(match[1])))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
