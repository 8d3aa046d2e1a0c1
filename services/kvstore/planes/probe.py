"""How fast a plane is: a real read of bytes that every store has."""

from __future__ import annotations

import time

from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT, Memory
from services.kvstore.planes.contract import Copied, Move, Plane, PlaneError

PROBE_BYTES, PROBE_BLOCKS = 4 << 20, 64


async def probe(plane: Plane, memory: Memory) -> float:
    """Bytes a second. Raises PlaneError when it fails; then the plane is closed.

    One block goes ahead: what a connection's first bytes cost says nothing of the rest (over NIXL it is longer than the
    probe itself).
    """
    blocks = min(PROBE_BLOCKS, max(2, PROBE_BYTES // memory.slot_bytes))
    await _read(plane, memory, 1)
    started = time.monotonic()
    await _read(plane, memory, blocks)
    return blocks * memory.slot_bytes / (time.monotonic() - started)


async def _read(plane: Plane, memory: Memory, blocks: int) -> None:
    copied = await plane.read([Move(PROBE_SLOT, 0, LANDING_SLOT)] * blocks, (0, 0.0))
    if set(copied) != {Copied.GOOD} or memory.checksum(LANDING_SLOT) != memory.checksum(PROBE_SLOT):
        plane.close()
        raise PlaneError("the probe did not come back whole")
