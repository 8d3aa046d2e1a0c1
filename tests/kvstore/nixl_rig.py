"""The two ends of the NIXL plane between two slabs of this process, and a hand on what happens between them."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.slab.host import HostSegment
from headway.v1 import transfer_pb2 as pb
from services.kvstore.memory import SlabMemory
from services.kvstore.planes.contract import Checksums, Move
from services.kvstore.planes.nixl_agent import Agent
from services.kvstore.planes.nixl_plane import NixlPlane
from services.kvstore.planes.nixl_source import NixlSource

# What two hosts without RDMA have, also for the kvstores of these tests. UCX reads it for every agent.
os.environ.setdefault("UCX_TLS", "tcp")
os.environ.setdefault("UCX_NET_DEVICES", "lo")

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


@contextmanager
def two_slabs() -> Iterator[tuple[Side, Side]]:
    """Source and reader; the source's slots are filled, each with its own byte."""
    with ExitStack() as stack:
        sides = []
        for _ in range(2):
            segment = HostSegment(f"headway-test-{uuid.uuid4().hex[:8]}", SLOTS * STRIDE)
            stack.callback(segment.remove)
            memory, pool = SlabMemory(segment.descriptor, segment.size), SlotPool(ForgetfulRecords(SLOTS))
            memory.lay_out(SLOT_BYTES, STRIDE, pool)
            sides.append(Side(memory, pool))
        sides[0].fill()
        yield sides[0], sides[1]


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


@contextmanager
def held(plane: NixlPlane) -> Iterator[None]:
    """The reader's agent does nothing meanwhile: what is on its way over TCP stays there, and the agent stays, too."""
    let_go = threading.Event()

    def wait(agent: Agent) -> None:
        let_go.wait(30)

    assert plane._thread is not None
    plane._thread.submit(wait)
    try:
        yield
    finally:
        let_go.set()


async def asked(stream: Stream) -> None:
    """Until the plane has asked for blocks, and none of them has come."""
    before = count(stream)
    while count(stream) == before:
        await asyncio.sleep(0)


def count(stream: Stream) -> int:
    return sum(request.HasField("move_nixl") for request in stream.sent)


async def begun(stream: Stream) -> None:
    """Until the source writes."""
    async with asyncio.timeout(5):
        while not any(link.moving for link in list(stream.source._links.values())):
            await asyncio.sleep(0.001)


async def untouched(side: Side) -> None:
    """Whatever was cleared stays clear."""
    side.fill(0)
    await asyncio.sleep(0.3)
    assert all(side.memory.view(slot) == bytes(SLOT_BYTES) for slot in range(SLOTS))
