"""The socket plane between two slabs over real sockets: what arrives is what was there, or not called good."""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import pytest

from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.slab.host import HostSegment, SlabError
from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT, Pieces, SlabMemory
from services.kvstore.planes.contract import Checksums, Copied, Move, PlaneError
from services.kvstore.planes.frames import pack_request
from services.kvstore.planes.socket_plane import SocketPlane
from services.kvstore.planes.socket_source import SocketSource
from tests.kvstore.faulty import Fault, Relay

SLOTS, SLOT_BYTES = 64, 200_000
STRIDE = 204_800
NOW = (0, 0.0)


@dataclass
class Side:
    memory: SlabMemory
    pool: SlotPool

    def fill(self) -> None:
        for slot in range(SLOTS):
            self.memory.view(slot)[:] = bytes([slot + 1]) * SLOT_BYTES


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    """Source and reader; the source's slots are filled, each with its own byte."""
    segments, made = [], []
    for _ in range(2):
        segment = HostSegment(f"headway-test-{uuid.uuid4().hex[:8]}", SLOTS * STRIDE)
        segments.append(segment)
        memory, pool = SlabMemory(segment.descriptor, segment.size), SlotPool(ForgetfulRecords(SLOTS))
        memory.lay_out(SLOT_BYTES, STRIDE, pool)
        made.append(Side(memory, pool))
    made[0].fill()
    yield made[0], made[1]
    for segment in segments:
        segment.remove()


@pytest.fixture
def source(sides: tuple[Side, Side]) -> Iterator[SocketSource]:
    source = SocketSource(sides[0].memory, "127.0.0.1", 1.0)
    source.start(0)
    yield source
    source.close()


Open = Callable[..., Any]


@asynccontextmanager
async def plane(
    sides: tuple[Side, Side], source: SocketSource, *, port: int = 0, checksum: str = "all", connections: int = 2
) -> AsyncIterator[SocketPlane]:
    plane = SocketPlane(sides[1].memory, Checksums(checksum), 0.5)

    async def ask() -> tuple[int, bytes]:
        return port or source.port, source.admit(plane)

    await plane.open("127.0.0.1", ask, connections)
    try:
        yield plane
    finally:
        plane.close()


def moves(pairs: dict[int, int]) -> list[Move]:
    return [Move(there, 0, here) for there, here in pairs.items()]


SCATTERED = {slot: (slot * 37 + 11) % SLOTS for slot in range(SLOTS)}


async def test_scattered_blocks_arrive_as_they_were(sides: tuple[Side, Side], source: SocketSource) -> None:
    async with plane(sides, source) as reader:
        assert await reader.read(moves(SCATTERED), NOW) == [Copied.GOOD] * SLOTS
    for there, here in SCATTERED.items():
        assert sides[1].memory.view(here) == sides[0].memory.view(there)


async def test_a_probe_needs_no_block(sides: tuple[Side, Side], source: SocketSource) -> None:
    async with plane(sides, source) as reader:
        assert await reader.read([Move(PROBE_SLOT, 0, LANDING_SLOT)] * 3, NOW) == [Copied.GOOD] * 3
    assert sides[1].memory.checksum(LANDING_SLOT) == sides[0].memory.checksum(PROBE_SLOT)


async def test_a_slot_given_out_anew_is_stale(sides: tuple[Side, Side], source: SocketSource) -> None:
    pool = sides[0].pool
    pool.give(pool.take(1))
    freed = pool.generations.index(1)
    async with plane(sides, source) as reader:
        copied = await reader.read(moves(SCATTERED), NOW)
    assert [slot for slot, what in enumerate(copied) if what is Copied.STALE] == [freed]
    assert copied.count(Copied.GOOD) == SLOTS - 1


async def test_a_read_given_up_twice_ends_only_when_nothing_arrives_any_more(
    sides: tuple[Side, Side], source: SocketSource
) -> None:
    proxy = Relay(source.port)
    proxy.arm(Fault.STALL, 100_000)
    try:
        async with plane(sides, source, port=proxy.port, connections=1) as reader:
            reading = asyncio.create_task(reader.read(moves(SCATTERED), NOW))
            while not proxy.struck:
                await asyncio.sleep(0.01)
            for _ in range(3):
                reading.cancel()
                await asyncio.sleep(0.02)
            assert not reading.done()
            with pytest.raises(asyncio.CancelledError):
                await reading
    finally:
        proxy.close()


async def test_an_error_of_our_own_side_ends_the_plane(
    sides: tuple[Side, Side], source: SocketSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As staging may raise for a slab on a device: nobody waits for a thread that is gone."""

    def incoming(slots: Sequence[int]) -> Pieces:
        raise SlabError("no pinned memory")

    async with plane(sides, source, connections=1) as reader:
        monkeypatch.setattr(sides[1].memory, "incoming", incoming)
        async with asyncio.timeout(5):
            assert await reader.read(moves(SCATTERED), NOW) == [Copied.MISSING] * SLOTS


class ShortOfDescriptors:
    """A listener whose next accept fails."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.failed = False

    def accept(self) -> Any:
        if not self.failed:
            self.failed = True
            raise OSError(errno.EMFILE, "too many open files")
        return self._listener.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


async def test_a_source_short_of_descriptors_serves_again(sides: tuple[Side, Side]) -> None:
    source = SocketSource(sides[0].memory, "127.0.0.1", 1.0)
    listener = ShortOfDescriptors(source._listener)
    source._listener = cast("socket.socket", listener)
    source.start(0)
    try:
        async with plane(sides, source, connections=1) as reader:
            assert await reader.read(moves({1: 2}), NOW) == [Copied.GOOD]
    finally:
        source.close()
    assert listener.failed


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("after", [1, 50_000, 9_500_000])
async def test_no_fault_makes_wrong_bytes_good(
    sides: tuple[Side, Side], source: SocketSource, fault: Fault, after: int
) -> None:
    """Whatever happens, at the first byte, in the middle of a block, in a later request: good means good."""
    proxy = Relay(source.port)
    proxy.arm(fault, after)
    started = time.monotonic()
    try:
        async with plane(sides, source, port=proxy.port, connections=1) as reader:
            copied = await reader.read(moves(SCATTERED), NOW)
    finally:
        proxy.close()
    assert proxy.struck
    assert time.monotonic() - started < 10
    assert len(copied) == SLOTS
    assert set(copied) <= {Copied.GOOD, Copied.MISSING, Copied.CORRUPT}
    assert Copied.GOOD in copied or after < 9_500_000
    assert copied.count(Copied.CORRUPT) == (fault is Fault.FLIP)
    assert (Copied.MISSING in copied) == (fault is not Fault.FLIP)
    for move, what in zip(moves(SCATTERED), copied, strict=True):
        if what is Copied.GOOD:
            assert sides[1].memory.view(move.slot) == sides[0].memory.view(move.source)


async def test_a_plane_that_broke_gives_nothing_more(sides: tuple[Side, Side], source: SocketSource) -> None:
    async with plane(sides, source) as reader:
        reader.close()
        assert await reader.read(moves({1: 2}), NOW) == [Copied.MISSING]


async def test_what_is_urgent_overtakes(sides: tuple[Side, Side], source: SocketSource) -> None:
    order: list[str] = []

    async def read(name: str, slot: int, urgency: tuple[int, float]) -> None:
        await reader.read([Move(slot, 0, slot)] * 60, urgency)
        order.append(name)

    async with plane(sides, source, connections=1) as reader:
        tasks = [
            asyncio.create_task(read("speculative", 1, (1, 0.0))),
            asyncio.create_task(read("young", 2, (0, 5.0))),
            asyncio.create_task(read("old", 3, (0, 1.0))),
        ]
        await asyncio.gather(*tasks)
    assert order == ["old", "young", "speculative"]


async def test_a_cancelled_read_writes_nothing_once_it_is_over(sides: tuple[Side, Side], source: SocketSource) -> None:
    async with plane(sides, source) as reader:
        task = asyncio.create_task(reader.read(moves(SCATTERED) * 20, NOW))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for slot in range(SLOTS):
            sides[1].memory.view(slot)[:] = bytes(SLOT_BYTES)
        await asyncio.sleep(0.1)
        assert all(sides[1].memory.view(slot) == bytes(SLOT_BYTES) for slot in range(SLOTS))
        assert await reader.read(moves({5: 6}), NOW) == [Copied.GOOD]


def connect(source: SocketSource, first: bytes) -> bytes:
    """What a stranger gets who sends this."""
    with socket.create_connection(("127.0.0.1", source.port)) as connection:
        connection.settimeout(10)
        # A source that hangs up on what it did not read resets the connection; what it said before stays readable.
        with suppress(OSError):
            connection.sendall(first)
            connection.shutdown(socket.SHUT_WR)
        try:
            return connection.recv(1000)
        except OSError:
            return b""


def test_without_the_secret_nothing_is_given(source: SocketSource) -> None:
    secret = source.admit("stranger")
    request = pack_request([(1, 0)], checksum=False)
    assert connect(source, b"x" * 32 + request) == b""
    assert connect(source, secret[:31]) == b""
    assert connect(source, request) == b""
    assert connect(source, secret + request)[:1] == b"\x01"
    # It opens one connection only, and none once its owner is gone.
    assert connect(source, secret + request) == b""
    late = source.admit("stranger")
    source.dismiss("stranger")
    assert connect(source, late + request) == b""


UNKNOWN_SLOT = pack_request([(SLOTS, 0)], checksum=False)
CUT_OFF = pack_request([(1, 0)], checksum=True)[:-1]


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", UNKNOWN_SLOT, CUT_OFF])
async def test_nonsense_ends_the_connection_and_nothing_else(
    sides: tuple[Side, Side], source: SocketSource, junk: bytes
) -> None:
    secret = source.admit("stranger")
    assert await asyncio.to_thread(connect, source, secret + junk) == b"\x01"
    async with plane(sides, source) as reader:
        assert await reader.read(moves({5: 6}), NOW) == [Copied.GOOD]


async def test_a_peer_without_sockets_is_told_apart(sides: tuple[Side, Side]) -> None:
    async def ask() -> tuple[int, bytes]:
        return 0, b""

    with pytest.raises(PlaneError, match="serves no sockets"):
        await SocketPlane(sides[1].memory, Checksums("off"), 1.0).open("127.0.0.1", ask, 1)


def test_sampled_checksums_are_some_of_all() -> None:
    wanted = [sum(itertools.islice(iter(Checksums(mode).wanted, None), 640)) for mode in ("off", "sampled", "all")]
    assert wanted == [0, 10, 640]
