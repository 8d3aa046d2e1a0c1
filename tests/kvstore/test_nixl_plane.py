"""The NIXL plane over UCX between two slabs of this process: what arrives is what was there, or not called good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from headway.v1 import transfer_pb2 as pb
from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT
from services.kvstore.planes.contract import Checksums, Copied, Move, PlaneError
from services.kvstore.planes.nixl_plane import NixlPlane
from services.kvstore.planes.nixl_source import NixlSource
from tests.kvstore.nixl_rig import NOW, SCATTERED, SLOTS, TIMEOUT_S, Side, Stream, moves, opened, two_slabs

pytestmark = pytest.mark.nixl


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    with two_slabs() as sides:
        yield sides


@pytest.fixture
async def source(sides: tuple[Side, Side]) -> AsyncIterator[NixlSource]:
    source = NixlSource(sides[0].memory, "source")
    yield source
    source.close()


@pytest.mark.parametrize("checksum", ["all", "off"])
async def test_scattered_blocks_arrive_as_they_were(
    sides: tuple[Side, Side], source: NixlSource, checksum: str
) -> None:
    async with opened(sides[1], source, checksum=checksum) as (plane, _):
        assert await plane.read(moves(SCATTERED), NOW) == [Copied.GOOD] * SLOTS
    for there, here in SCATTERED.items():
        assert sides[1].memory.view(here) == sides[0].memory.view(there)


async def test_a_probe_needs_no_block(sides: tuple[Side, Side], source: NixlSource) -> None:
    async with opened(sides[1], source) as (plane, _):
        assert await plane.read([Move(PROBE_SLOT, 0, LANDING_SLOT)] * 3, NOW) == [Copied.GOOD] * 3
    assert sides[1].memory.checksum(LANDING_SLOT) == sides[0].memory.checksum(PROBE_SLOT)


async def test_a_slot_given_out_anew_is_stale(sides: tuple[Side, Side], source: NixlSource) -> None:
    pool = sides[0].pool
    pool.give(pool.take(1))
    freed = pool.generations.index(1)
    async with opened(sides[1], source) as (plane, _):
        copied = await plane.read(moves(SCATTERED), NOW)
    assert [slot for slot, what in enumerate(copied) if what is Copied.STALE] == [freed]
    assert copied.count(Copied.GOOD) == SLOTS - 1


async def test_flipped_bits_are_found(sides: tuple[Side, Side], source: NixlSource) -> None:
    async with opened(sides[1], source) as (plane, stream):
        real = stream.put

        def put(response: pb.ConnectResponse) -> None:
            # As if they had flipped on their way: the bytes have landed, nobody has looked at them.
            if response.HasField("nixl_moved"):
                sides[1].memory.view(9)[100] ^= 1
            real(response)

        stream.put = put  # type: ignore[method-assign]
        assert await plane.read(moves({4: 9, 5: 10}), NOW) == [Copied.CORRUPT, Copied.GOOD]


async def test_what_is_urgent_overtakes(sides: tuple[Side, Side], source: NixlSource) -> None:
    order: list[str] = []

    async def read(name: str, slot: int, urgency: tuple[int, float]) -> None:
        await plane.read([Move(slot, 0, slot)] * 120, urgency)
        order.append(name)

    async with opened(sides[1], source) as (plane, stream):
        first = asyncio.create_task(read("first", 0, (1, 0.0)))
        await asyncio.sleep(0)
        others = [("speculative", 1, (1, 1.0)), ("young", 2, (0, 5.0)), ("old", 3, (0, 1.0))]
        await asyncio.gather(first, *(read(*other) for other in others))
        asked = sum(request.HasField("move_nixl") for request in stream.sent)
    assert order.index("old") < order.index("young") < order.index("speculative")
    assert asked == 12


@pytest.mark.parametrize("wrong", ["slot", "target", "counts"])
async def test_nonsense_breaks_the_plane_of_who_asks_and_nothing_else(
    sides: tuple[Side, Side], source: NixlSource, wrong: str
) -> None:
    async with opened(sides[1], source) as (good, _), opened(sides[1], source) as (_, stream):
        move = pb.MoveNixl(request_id=7, slots=[1], generations=[0], targets=[2])
        if wrong == "slot":
            move.slots[0] = SLOTS
        elif wrong == "target":
            move.targets[0] = SLOTS + 100
        else:
            move.targets.append(1)
        stream.send(pb.ConnectRequest(move_nixl=move))
        async with asyncio.timeout(5):
            while not stream.heard[-1].HasField("nixl_moved"):
                await asyncio.sleep(0.01)
        assert stream.heard[-1].nixl_moved.error
        assert await good.read(moves({5: 6}), NOW) == [Copied.GOOD]


async def test_an_address_that_is_not_registered_is_refused(sides: tuple[Side, Side], source: NixlSource) -> None:
    stream = Stream(source)

    def send(request: pb.ConnectRequest) -> None:
        if request.HasField("open_nixl"):
            request.open_nixl.card.slab_address += 1 << 30
        Stream.send(stream, request)

    stream.plane = NixlPlane(sides[1].memory, Checksums("off"), TIMEOUT_S, send)
    with pytest.raises(PlaneError, match="the peer's agent: "):
        await stream.plane.open("reader")
