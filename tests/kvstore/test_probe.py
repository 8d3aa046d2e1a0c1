"""What a probe says of a plane."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence

import pytest

from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.slab.host import HostSegment
from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT, SlabMemory
from services.kvstore.planes.contract import Copied, Move, PlaneError, Urgency
from services.kvstore.planes.probe import PROBE_BLOCKS, probe

SLOT_BYTES = 4096


class Copying:
    """Brings what the probe asks for; its first read waits, its last words may be wrong."""

    name = "copying"

    def __init__(self, memory: SlabMemory, *, wait_s: float = 0.0, result: Copied = Copied.GOOD, flip: bool = False):
        self.memory, self.wait_s, self.result, self.flip = memory, wait_s, result, flip
        self.reads: list[int] = []
        self.closed = False

    async def read(self, moves: Sequence[Move], urgency: Urgency) -> list[Copied]:
        if not self.reads:
            await asyncio.sleep(self.wait_s)
        self.reads.append(len(moves))
        self.memory.view(LANDING_SLOT)[:] = self.memory.view(PROBE_SLOT)
        if self.flip and len(moves) > 1:
            self.memory.view(LANDING_SLOT)[-1] ^= 1
        return [*[Copied.GOOD] * (len(moves) - 1), self.result]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def memory() -> Iterator[SlabMemory]:
    segment = HostSegment(f"headway-test-{uuid.uuid4().hex[:8]}", 8 * SLOT_BYTES)
    memory = SlabMemory(segment.descriptor, segment.size)
    memory.lay_out(SLOT_BYTES, SLOT_BYTES, SlotPool(ForgetfulRecords(8)))
    yield memory
    segment.remove()


async def test_what_the_first_bytes_cost_does_not_count(memory: SlabMemory) -> None:
    plane = Copying(memory, wait_s=0.5)
    assert await probe(plane, memory) > PROBE_BLOCKS * SLOT_BYTES / 0.5
    assert plane.reads == [1, PROBE_BLOCKS]
    assert not plane.closed


@pytest.mark.parametrize("wrong", [{"result": Copied.MISSING}, {"result": Copied.CORRUPT}, {"flip": True}], ids=str)
async def test_a_probe_that_does_not_come_back_whole_closes_the_plane(
    memory: SlabMemory, wrong: dict[str, object]
) -> None:
    plane = Copying(memory, **wrong)  # type: ignore[arg-type]
    with pytest.raises(PlaneError):
        await probe(plane, memory)
    assert plane.closed
