"""The NIXL plane over UCX: what arrives is what was there, or not called good; nothing is written once a read is over.

First between two slabs in this process, then between two real kvstores.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.slab.host import HostSegment
from headway.v1 import transfer_pb2 as pb
from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT, SlabMemory
from services.kvstore.planes.contract import Checksums, Copied, Move, PlaneError
from services.kvstore.planes.nixl_agent import MODULES
from services.kvstore.planes.nixl_plane import NixlPlane
from services.kvstore.planes.nixl_source import NixlSource
from tests.kvstore.pulling import BLOCK, pair
from tests.kvstore.pulling import SLOT_BYTES as BLOCK_BYTES
from tests.kvstore.pulling import SLOTS as PAIR_SLOTS
from tests.kvstore.rig import release, rust_built, until

# UCX reads its settings when NIXL is first imported, by the kvstores of these tests too.
os.environ.setdefault("UCX_TLS", "tcp")
os.environ.setdefault("UCX_NET_DEVICES", "lo")

needs_nixl = pytest.mark.nixl

SLOTS, SLOT_BYTES = 64, 200_000
STRIDE = 204_800
NOW = (0, 0.0)
SCATTERED = {slot: (slot * 37 + 11) % SLOTS for slot in range(SLOTS)}
TIMEOUT_S = 1.0


@dataclass
class Side:
    memory: SlabMemory
    pool: SlotPool

    def fill(self, byte: int | None = None) -> None:
        for slot in range(SLOTS):
            self.memory.view(slot)[:] = bytes([slot + 1 if byte is None else byte]) * SLOT_BYTES


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
async def source(sides: tuple[Side, Side]) -> AsyncIterator[NixlSource]:
    source = NixlSource(sides[0].memory, "source")
    yield source
    source.close()


@dataclass(eq=False)
class Stream:
    """Stands for a Connect stream; `cut` ends it on the source's side."""

    source: NixlSource
    plane: NixlPlane | None = None
    joiner: str = "@reader"
    deaf: bool = False
    sent: list[pb.ConnectRequest] = field(default_factory=list)
    heard: list[pb.ConnectResponse] = field(default_factory=list)

    def send(self, request: pb.ConnectRequest) -> None:
        self.sent.append(request)
        self.source.heard(request, self)  # type: ignore[arg-type]

    def put(self, response: pb.ConnectResponse) -> None:
        self.heard.append(response)
        if self.plane is not None and not self.deaf:
            self.plane.heard(response)

    def cut(self) -> None:
        self.source.dismiss(self)  # type: ignore[arg-type]


@asynccontextmanager
async def opened(side: Side, source: NixlSource, *, checksum: str = "all") -> AsyncIterator[tuple[NixlPlane, Stream]]:
    stream = Stream(source)
    stream.plane = NixlPlane(side.memory, Checksums(checksum), TIMEOUT_S, stream.send)
    await stream.plane.open("reader")
    try:
        yield stream.plane, stream
    finally:
        stream.plane.close()


def moves(pairs: dict[int, int]) -> list[Move]:
    return [Move(there, 0, here) for there, here in pairs.items()]


@needs_nixl
@pytest.mark.parametrize("checksum", ["all", "off"])
async def test_scattered_blocks_arrive_as_they_were(
    sides: tuple[Side, Side], source: NixlSource, checksum: str
) -> None:
    async with opened(sides[1], source, checksum=checksum) as (plane, _):
        assert await plane.read(moves(SCATTERED), NOW) == [Copied.GOOD] * SLOTS
    for there, here in SCATTERED.items():
        assert sides[1].memory.view(here) == sides[0].memory.view(there)


@needs_nixl
async def test_a_probe_needs_no_block(sides: tuple[Side, Side], source: NixlSource) -> None:
    async with opened(sides[1], source) as (plane, _):
        assert await plane.read([Move(PROBE_SLOT, 0, LANDING_SLOT)] * 3, NOW) == [Copied.GOOD] * 3
    assert sides[1].memory.checksum(LANDING_SLOT) == sides[0].memory.checksum(PROBE_SLOT)


@needs_nixl
async def test_a_slot_given_out_anew_is_stale(sides: tuple[Side, Side], source: NixlSource) -> None:
    pool = sides[0].pool
    pool.give(pool.take(1))
    freed = pool.generations.index(1)
    async with opened(sides[1], source) as (plane, _):
        copied = await plane.read(moves(SCATTERED), NOW)
    assert [slot for slot, what in enumerate(copied) if what is Copied.STALE] == [freed]
    assert copied.count(Copied.GOOD) == SLOTS - 1


@needs_nixl
async def test_a_slot_given_out_while_it_moves_is_stale(sides: tuple[Side, Side], source: NixlSource) -> None:
    """The generation counts that it has when all its bytes are read, not the one before."""
    async with opened(sides[1], source, checksum="off") as (plane, stream):
        # The request is there, and its bytes cannot have moved: this thread has not let the reader's make progress.
        reading = asyncio.create_task(plane.read([Move(5, 0, 6)] * 40, NOW))
        while not any(request.HasField("move_nixl") for request in stream.sent):
            await asyncio.sleep(0)
        sides[0].pool.generations[5] = 1
        assert await reading == [Copied.STALE] * 40


@needs_nixl
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


@needs_nixl
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


@needs_nixl
async def test_a_cancelled_read_writes_nothing_once_it_is_over(sides: tuple[Side, Side], source: NixlSource) -> None:
    async with opened(sides[1], source) as (plane, stream):
        task = asyncio.create_task(plane.read(moves(SCATTERED) * 20, NOW))
        while not any(request.HasField("move_nixl") for request in stream.sent):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        # A second one does not cut the wait short.
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        sides[1].fill(0)
        await untouched(sides[1])
        assert await plane.read(moves({5: 6}), NOW) == [Copied.GOOD]


async def untouched(side: Side) -> None:
    await asyncio.sleep(0.3)
    assert all(side.memory.view(slot) == bytes(SLOT_BYTES) for slot in range(SLOTS))


@needs_nixl
@pytest.mark.parametrize("how", ["silent", "closed", "stream cut"])
async def test_a_plane_that_breaks_writes_nothing_once_it_has_said_so(
    sides: tuple[Side, Side], source: NixlSource, how: str
) -> None:
    """The source goes on, or says nothing; after MISSING the reader's slots are out of reach."""
    async with opened(sides[1], source) as (plane, stream):
        stream.deaf = True
        started = time.monotonic()
        task = asyncio.create_task(plane.read(moves(SCATTERED) * 20, NOW))
        while not any(request.HasField("move_nixl") for request in stream.sent):
            await asyncio.sleep(0)
        if how == "closed":
            plane.close()
        elif how == "stream cut":
            stream.cut()
        assert await task == [Copied.MISSING] * SLOTS * 20
        assert time.monotonic() - started < TIMEOUT_S * 2
        sides[1].fill(0)
        await untouched(sides[1])
        assert await plane.read(moves({1: 2}), NOW) == [Copied.MISSING]
    # The source serves the next one.
    async with opened(sides[1], source) as (plane, _):
        assert await plane.read(moves({5: 6}), NOW) == [Copied.GOOD]


@needs_nixl
async def test_readers_do_not_disturb_each_other(sides: tuple[Side, Side], source: NixlSource) -> None:
    """One goes away in the middle of a transfer; the other's blocks come."""
    async with opened(sides[1], source) as (staying, _), opened(sides[1], source) as (leaving, _):
        tasks = [asyncio.create_task(plane.read(moves(SCATTERED) * 10, NOW)) for plane in (leaving, staying)]
        await asyncio.sleep(0.02)
        leaving.close()
        left, stayed = await asyncio.gather(*tasks)
        assert Copied.MISSING in left
        assert stayed == [Copied.GOOD] * SLOTS * 10


@needs_nixl
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


@needs_nixl
async def test_an_address_that_is_not_registered_is_refused(sides: tuple[Side, Side], source: NixlSource) -> None:
    stream = Stream(source)

    def send(request: pb.ConnectRequest) -> None:
        if request.HasField("open_nixl"):
            request.open_nixl.card.slab_address += 1 << 30
        Stream.send(stream, request)

    stream.plane = NixlPlane(sides[1].memory, Checksums("off"), TIMEOUT_S, send)
    with pytest.raises(PlaneError, match="the peer's agent: "):
        await stream.plane.open("reader")


# ---------------------------------------------------------------------- kvstores


@pytest.mark.skipif(any(map(importlib.util.find_spec, MODULES)), reason="NIXL is installed")
def test_naming_nixl_without_the_package_says_what_to_do() -> None:
    check_refusal(os.environ.copy())


def test_naming_nixl_where_it_cannot_be_imported_says_what_to_do(tmp_path: Path) -> None:
    """Everywhere: a package of each name that cannot be imported stands in front."""
    for module in MODULES:
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise ImportError('no such library')\n")
    check_refusal({**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])})


def check_refusal(env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "services.kvstore.server", "--planes", "nixl,grpc", "--port", "0"]
    command += ["--slab-name", f"headway-test-{uuid.uuid4().hex[:8]}", "--slab-bytes", str(1 << 20)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("headway-kvstore: the plane nixl needs the package NIXL, which cannot be imported")
    assert line.endswith("install the extra (pip install 'headway[nixl]'), or leave nixl out of the setting planes")


FORTY = list(range(40 * BLOCK))


@needs_nixl
async def test_two_kvstores_move_a_prefix(tmp_path: Path) -> None:
    async with pair(tmp_path, "--planes", "nixl,grpc") as two:
        await two.source.compute(FORTY)
        lease_id, pulled = await two.fetch([*FORTY, 1])
        assert (pulled.cached_tokens, pulled.bytes) == (len(FORTY), 40 * BLOCK_BYTES)
        (peer,) = (await two.reader.stats()).peers
        assert (peer.plane, peer.blocks, peer.fallbacks) == ("nixl", 40, 0)
        assert rust_built(two.source.process.pid) == rust_built(two.reader.process.pid) == []
        await two.reader.worker.run(release(lease_id))
        figures = await until(two.reader.address, lambda reply: not reply.leases)
        assert figures.free_slots + figures.cached_slots == PAIR_SLOTS


@needs_nixl
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01])
async def test_a_source_that_is_gone_in_the_middle_costs_time_and_no_slot(
    tmp_path: Path, number: signal.Signals, after_s: float
) -> None:
    async with pair(tmp_path, "--planes", "nixl,grpc") as two:
        await two.source.compute(FORTY)
        # Connected and probed, so that the next one is in the middle of its bytes.
        lease_id, _ = await two.fetch([*FORTY[: 2 * BLOCK], 1])
        await two.reader.worker.run(release(lease_id))
        fetching = asyncio.create_task(two.fetch([*FORTY, 1]))
        await asyncio.sleep(after_s)
        two.source.process.signal(number)
        started = time.monotonic()
        # Checks that what is said to be there is right.
        lease_id, _ = await fetching
        assert time.monotonic() - started < 12
        await two.reader.worker.run(release(lease_id))
        figures = await until(two.reader.address, lambda reply: not reply.leases and not reply.transfers_in_flight)
        assert figures.free_slots + figures.cached_slots == PAIR_SLOTS


@needs_nixl
@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01])
async def test_a_reader_that_is_killed_in_the_middle_does_not_disturb_the_source(
    tmp_path: Path, after_s: float
) -> None:
    async with pair(tmp_path, "--planes", "nixl,grpc") as two:
        await two.source.compute(FORTY)
        lease_id, _ = await two.fetch([*FORTY[: 2 * BLOCK], 1])
        await two.reader.worker.run(release(lease_id))
        fetching = asyncio.create_task(two.fetch([*FORTY, 1]))
        await asyncio.sleep(after_s)
        two.reader.process.signal(signal.SIGKILL)
        await asyncio.gather(fetching, return_exceptions=True)
        figures = await until(two.source.address, lambda reply: not reply.leases)
        assert figures.free_slots + figures.cached_slots == PAIR_SLOTS
        # UCX notices a dead peer after a while.
        await asyncio.sleep(2.0)
        assert (await two.source.stats()).cached_slots == figures.cached_slots
