"""The gRPC plane between two slabs: a block that was given out anew ends there, and the next ones come right."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.slab.host import HostSegment
from headway.v1 import transfer_pb2 as pb
from services.kvstore.memory import SlabMemory
from services.kvstore.planes.contract import Checksums, Copied, Move
from services.kvstore.planes.grpc_plane import MESSAGE_BYTES, GrpcPlane, pieces

# Three messages a block.
SLOT_BYTES = 2 * MESSAGE_BYTES + 4096
SLOTS = 4
NOW = (0, 0.0)
GOOD, STALE, CORRUPT, MISSING = Copied.GOOD, Copied.STALE, Copied.CORRUPT, Copied.MISSING


class Call:
    """A ReadBlocks call: `spoil(number, message)` is what arrives as the message of that number; None: the end."""

    def __init__(self, messages: AsyncIterator[bytes], spoil: Any) -> None:
        self._messages, self._spoil, self._number = messages, spoil, -1

    async def read(self) -> Any:
        self._number += 1
        message = self._spoil(self._number, await anext(self._messages, None))
        return grpc.aio.EOF if message is None else message

    def cancel(self) -> None: ...


class Rig:
    def __init__(self, source: SlabMemory, pool: SlotPool, target: SlabMemory) -> None:
        self.source, self.pool, self.target = source, pool, target
        self.spoil = lambda number, message: message
        self.plane = GrpcPlane(target, Checksums("all"), 1.0)
        self.plane._read_blocks = lambda request: Call(pieces(source, request), self.spoil)

    async def read(self, *generations: int) -> list[Copied]:
        """Of the source's slots 0, 1, …; checks what is said to be good."""
        copied = await self.plane.read(
            [Move(slot, generation, slot) for slot, generation in enumerate(generations)], NOW
        )
        for slot, what in enumerate(copied):
            assert what is not GOOD or self.target.view(slot) == self.source.view(slot)
        return copied


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    with ExitStack() as stack:
        pool = SlotPool(ForgetfulRecords(SLOTS))
        memories = []
        for _ in range(2):
            segment = HostSegment(f"headway-test-{uuid.uuid4().hex[:8]}", SLOTS * SLOT_BYTES)
            stack.callback(segment.remove)
            memory = SlabMemory(segment.descriptor, segment.size)
            memory.lay_out(SLOT_BYTES, SLOT_BYTES, pool)
            memories.append(memory)
        for slot in range(SLOTS):
            memories[0].view(slot)[:] = bytes([slot + 1]) * SLOT_BYTES
        yield Rig(memories[0], pool, memories[1])


async def test_a_block_that_was_given_out_anew_costs_only_itself(rig: Rig) -> None:
    assert await rig.read(0, 5, 0) == [GOOD, STALE, GOOD]


@pytest.mark.parametrize("message", range(3))
async def test_a_block_that_is_given_out_anew_in_the_middle_costs_only_itself(rig: Rig, message: int) -> None:
    slots = rig.pool.take(SLOTS)

    def give_out(number: int, arrived: Any) -> Any:
        # The source makes a message as the one before it is taken.
        if number == 2 + message:
            rig.pool.give([1])
            assert rig.pool.take(1) == [1]
        return arrived

    rig.spoil = give_out
    assert len(slots) == SLOTS
    copied = await rig.read(0, 0, 0)
    assert copied[0] is copied[2] is GOOD
    assert copied[1] is STALE
    rig.pool.give(slots)


async def test_a_flipped_bit_costs_only_its_block(rig: Rig) -> None:
    rig.spoil = lambda number, message: message[:-1] + bytes([message[-1] ^ 1]) if number == 4 else message
    assert await rig.read(0, 0, 0) == [GOOD, CORRUPT, GOOD]


@pytest.mark.parametrize("end", [1, 3, 4])
async def test_a_call_that_ends_early_leaves_the_rest_missing(rig: Rig, end: int) -> None:
    rig.spoil = lambda number, message: None if number >= end else message
    whole = end // 3
    assert await rig.read(0, 0, 0) == [GOOD] * whole + [MISSING] * (3 - whole)
    assert await rig.read(0) == [MISSING]


async def test_a_piece_of_another_block_ends_the_call(rig: Rig) -> None:
    def other(number: int, message: bytes) -> bytes:
        return message if number else pb.ReadBlocksResponse(index=1, data=b"x", current=True).SerializeToString()

    rig.spoil = other
    assert await rig.read(0, 0) == [MISSING] * 2
