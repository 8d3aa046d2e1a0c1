"""One store's connection to another: what it reads, what it does when planes break, and who waits for that."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headway.core.keys import block_keys
from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.slab.host import HostSegment, slot_stride
from headway.v1 import transfer_pb2 as pb
from services.kvstore import peer_link
from services.kvstore.config import KvStoreConfig
from services.kvstore.memory import SlabMemory
from services.kvstore.peer_link import Link, PeerError
from services.kvstore.peers import Peer
from services.kvstore.planes.contract import Checksums, Copied, Move
from tests.kvstore.faulty import Fault
from tests.kvstore.pulling import BLOCK, NAMESPACE, SLOT_BYTES, SLOTS, WIDE, Pair, content, pair

TOKENS = list(range(4 * BLOCK))
KEYS = block_keys(NAMESPACE, TOKENS, BLOCK)
NOW = (0, 0.0)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Pair]:
    async with pair(tmp_path) as two:
        await two.source.compute(TOKENS)
        yield two


@pytest.fixture
def memory() -> Iterator[SlabMemory]:
    stride = slot_stride(SLOT_BYTES)
    segment = HostSegment(f"headway-test-{uuid.uuid4().hex[:8]}", SLOTS * stride)
    memory = SlabMemory(segment.descriptor, segment.size)
    memory.lay_out(SLOT_BYTES, stride, SlotPool(ForgetfulRecords(SLOTS)))
    yield memory
    segment.remove()


@asynccontextmanager
async def connected(memory: SlabMemory, address: str, *planes: str) -> AsyncIterator[Peer]:
    """A third node's way to the store at `address`."""
    config = KvStoreConfig(node_id="third", planes=planes, transfer_timeout_s=1.0, transfer_connections=1)
    node: Any = SimpleNamespace(config=config, kv_format=WIDE, memory=memory, corrupt_blocks=0, stale_blocks=0)
    peer = Peer(node, address, Checksums("all"))
    try:
        yield peer
    finally:
        await peer.close()


async def fetch(peer: Peer) -> list[Copied]:
    held = await peer.pin(1, KEYS, 0, 0.0)
    return await peer.read(held.epoch, moves(held), NOW)


def moves(held: Any) -> list[Move]:
    return [
        Move(slot, generation, at)
        for at, (slot, generation) in enumerate(zip(held.slots, held.generations, strict=True))
    ]


async def becomes(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(4):
        while not true():
            await asyncio.sleep(0.01)


async def test_slots_that_were_told_of_in_another_life_of_the_peer_are_not_read(two: Pair, memory: SlabMemory) -> None:
    """A store that starts with a new slab counts generations from 0 again: an old pair may mean another block."""
    async with connected(memory, two.source.address, "socket", "grpc") as peer:
        held = await peer.pin(1, KEYS, 0, 0.0)
        with pytest.raises(PeerError, match="started anew"):
            await peer.read(held.epoch - 1, moves(held), NOW)
        assert await peer.read(held.epoch, moves(held), NOW) == [Copied.GOOD] * 4
    for at in range(4):
        assert bytes(memory.view(at)) == content(TOKENS, at).tobytes()


async def test_a_pull_given_up_while_it_waits_for_a_repair_ends_and_the_repair_goes_on(
    two: Pair, memory: SlabMemory
) -> None:
    async with connected(memory, two.via, "socket") as peer:
        assert await fetch(peer) == [Copied.GOOD] * 4
        two.data.arm(Fault.STALL, 0)
        two.data.cut()
        reading = asyncio.create_task(fetch(peer))
        await becomes(lambda: two.data.struck)
        reading.cancel()
        await asyncio.wait([reading], timeout=0.5)
        assert reading.cancelled()
        two.data.resumed.set()
        await becomes(lambda: peer.figures.plane == "socket")
        assert await fetch(peer) == [Copied.GOOD] * 4


async def test_a_broken_plane_is_tried_again_until_it_works(
    two: Pair, memory: SlabMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_link, "REPAIR_S", 0.1)
    async with connected(memory, two.via, "socket", "grpc") as peer:
        await fetch(peer)
        two.data.arm(Fault.STALL, 0)
        two.data.cut()
        assert await fetch(peer) == [Copied.GOOD] * 4
        assert (peer.figures.plane, peer.figures.fallbacks) == ("grpc", 1)
        await becomes(lambda: "plane=socket event=plane_failed" in caplog.text)
        two.data.resumed.set()
        await becomes(lambda: peer.figures.plane == "socket")


async def test_those_who_ask_a_silent_peer_do_not_wait_one_after_the_other(memory: SlabMemory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with connected(memory, f"127.0.0.1:{silent.getsockname()[1]}", "socket", "grpc") as peer:
            with pytest.raises(PeerError, match="no connection"):
                await fetch(peer)
            started = time.monotonic()
            for _ in range(10):
                with pytest.raises(PeerError, match="no connection"):
                    await fetch(peer)
            assert time.monotonic() - started < 0.5


async def test_a_pull_that_is_given_up_as_it_is_told_something_ends() -> None:
    """Whatever the moment: else it would wait for more of a prefill that was given up as well."""
    answers = 0
    for ticks in range(8):
        link: Any = Link.__new__(Link)
        link._broken, link._held = False, {1: asyncio.Queue()}
        task = asyncio.create_task(link.told(1, 5.0, asyncio.Event()))
        await asyncio.sleep(0.01)
        link._held[1].put_nowait(pb.BlocksHeld())
        for _ in range(ticks):
            await asyncio.sleep(0)
        given_up = task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == given_up, f"after {ticks} turns of the loop"
        answers += not given_up
    assert 0 < answers < 8
