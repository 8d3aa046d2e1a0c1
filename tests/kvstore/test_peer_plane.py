"""Copies from device to device (NumPy's) on one host: what is not certainly the block's is not called good."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.slab.device import DeviceError, DeviceSegment, open_device
from headway.v1 import transfer_pb2 as pb
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import PROBE_SLOT
from services.kvstore.planes.contract import Checksums, Copied, Move, PlaneError
from services.kvstore.planes.peer_plane import PeerPlane
from services.kvstore.planes.peer_source import PeerSource, boot_id
from tests.kvstore.pulling import BLOCK, SLOTS, Pair, pair
from tests.kvstore.rig import release, until

SLOT_BYTES = 4096
NOW = (0, 0.0)
GOOD, STALE, CORRUPT, MISSING = Copied.GOOD, Copied.STALE, Copied.CORRUPT, Copied.MISSING
FORTY = list(range(40 * BLOCK))
PEER = ("--device", "numpy:0", "--planes", "peer")


@dataclass
class Source:
    """The other end of the stream, and the way to its slab."""

    plane: PeerPlane | None = None
    checks: list[pb.CheckBlocks] = field(default_factory=list)
    copied: list[Move] = field(default_factory=list)
    answer: Callable[[pb.CheckBlocks], pb.BlocksChecked | None] = lambda check: None
    error: str = ""
    closed: bool = False
    may_copy: threading.Event = field(default_factory=threading.Event)

    def send(self, request: pb.ConnectRequest) -> None:
        if request.HasField("check"):
            self.checks.append(request.check)
            if checked := self.answer(request.check):
                assert self.plane is not None
                self.plane.heard(pb.ConnectResponse(checked=checked))

    def copy(self, moves: Sequence[Move]) -> None:
        assert self.may_copy.wait(10)
        if self.error:
            raise DeviceError(self.error)
        self.copied += moves

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    device = open_device("numpy:0")
    assert device is not None
    segment = DeviceSegment(device, 600 * SLOT_BYTES)
    memory = DeviceMemory(segment)
    memory.lay_out(SLOT_BYTES, SLOT_BYTES, SlotPool(ForgetfulRecords(600)))
    yield memory
    segment.remove()


def opened(memory: DeviceMemory, checksum: str = "off", timeout_s: float = 1.0) -> tuple[PeerPlane, Source]:
    source = Source()
    source.plane = PeerPlane(memory, Checksums(checksum), timeout_s, source.send)
    cast_plane: Any = source.plane
    cast_plane._way = source
    source.may_copy.set()
    return source.plane, source


def current(check: pb.CheckBlocks) -> pb.BlocksChecked:
    return pb.BlocksChecked(request_id=check.request_id, current=[True] * len(check.slots))


MOVES = [Move(slot, 7, slot + 10) for slot in range(3)]


async def test_only_what_the_source_vouches_for_afterwards_is_good(memory: DeviceMemory) -> None:
    plane, source = opened(memory)

    def stale(check: pb.CheckBlocks) -> pb.BlocksChecked:
        assert source.copied == MOVES
        assert (list(check.slots), list(check.generations)) == ([0, 1, 2], [7, 7, 7])
        return pb.BlocksChecked(request_id=check.request_id, current=[True, False, True])

    source.answer = stale
    assert await plane.read(MOVES, NOW) == [GOOD, STALE, GOOD]
    plane.close()


async def test_a_flipped_bit_is_found_where_checksums_are_asked_for(memory: DeviceMemory) -> None:
    plane, source = opened(memory, "all")
    sums = memory.checksums([10, 11, 12])

    def flipped(check: pb.CheckBlocks) -> pb.BlocksChecked:
        assert check.checksum
        return pb.BlocksChecked(
            request_id=check.request_id, current=[True] * 3, checksums=[sums[0], sums[1] ^ 1, sums[2]]
        )

    source.answer = flipped
    assert await plane.read(MOVES, NOW) == [GOOD, CORRUPT, GOOD]
    plane.close()


async def test_a_large_read_is_one_request_after_the_other(memory: DeviceMemory) -> None:
    plane, source = opened(memory)
    source.answer = current
    plane._batch = 100
    assert await plane.read([Move(0, 7, slot) for slot in range(250)], NOW) == [GOOD] * 250
    assert [len(check.slots) for check in source.checks] == [100, 100, 50]
    plane.close()


@pytest.mark.parametrize("how", ["no answer", "an answer that does not fit", "a refused copy", "closed meanwhile"])
async def test_what_fails_closes_the_plane_and_nothing_is_good(memory: DeviceMemory, how: str) -> None:
    plane, source = opened(memory, timeout_s=0.2)
    if how == "a refused copy":
        source.error = "an illegal address"
    elif how == "an answer that does not fit":
        source.answer = lambda check: pb.BlocksChecked(request_id=check.request_id, current=[True])
    elif how == "closed meanwhile":
        source.may_copy.clear()
        asyncio.get_running_loop().call_later(0.05, plane.close)
        asyncio.get_running_loop().call_later(0.1, source.may_copy.set)
    assert await plane.read(MOVES, NOW) == [MISSING] * 3
    assert await plane.read(MOVES, NOW) == [MISSING] * 3
    async with asyncio.timeout(5):
        while not source.closed:
            await asyncio.sleep(0.01)


async def test_a_read_that_is_given_up_ends_only_when_its_copies_have(memory: DeviceMemory) -> None:
    plane, source = opened(memory)
    source.may_copy.clear()
    reading = asyncio.create_task(plane.read(MOVES, NOW))
    await asyncio.sleep(0.05)
    for _ in range(2):
        reading.cancel()
        await asyncio.sleep(0.05)
        assert not reading.done()
    source.may_copy.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert source.copied == MOVES
    plane.close()


async def test_closing_while_a_read_is_given_up_harms_nobody(memory: DeviceMemory) -> None:
    """The answer comes, and the plane is closed, in the very moment in which the read is cancelled."""
    plane, source = opened(memory)
    reading = asyncio.create_task(plane.read(MOVES, NOW))
    async with asyncio.timeout(5):
        while not source.checks:
            await asyncio.sleep(0)
    reading.cancel()
    plane.heard(pb.ConnectResponse(checked=current(source.checks[0])))
    plane.close()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not plane._checks


async def test_a_plane_that_is_closed_while_it_opens_lets_go_of_the_slab(
    memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Source] = []

    def slow_way(memory: DeviceMemory, opened: pb.PeerOpened) -> Source:
        time.sleep(0.1)
        found.append(Source())
        return found[-1]

    monkeypatch.setattr("services.kvstore.planes.peer_plane._Way", slow_way)
    plane = PeerPlane(memory, Checksums("off"), 1.0, lambda request: None)
    answer = pb.PeerOpened(host=boot_id(), kind="numpy", bus_id="host:1")
    loop = asyncio.get_running_loop()
    loop.call_soon(plane.heard, pb.ConnectResponse(peer_opened=answer))
    loop.call_later(0.05, plane.close)
    with pytest.raises(PlaneError, match="the plane was closed"):
        await plane.open()
    async with asyncio.timeout(5):
        while not found[0].closed:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"host": "another"}, "the peer is on another host"),
        ({"kind": "cuda"}, "the peer's slab is on a cuda device, this one on numpy:0"),
        ({"bus_id": "host:9"}, "numpy:0 does not reach the peer's device host:9 directly"),
        ({"error": "no room for a probe"}, "the peer: no room for a probe"),
        ({}, "the slab's handle cannot be opened"),
    ],
)
async def test_a_slab_that_cannot_be_reached_is_one_sentence(
    memory: DeviceMemory, changed: dict[str, str], sentence: str
) -> None:
    plane = PeerPlane(memory, Checksums("off"), 1.0, lambda request: None)
    place = {"host": boot_id(), "kind": "numpy", "bus_id": "host:1"} | changed
    handle = b"1/999".ljust(64, b"\0")
    answer = pb.PeerOpened(handle=handle, bytes=4096, probe_handle=handle, probe_bytes=4096, **place)  # type: ignore[arg-type]
    asyncio.get_running_loop().call_soon(plane.heard, pb.ConnectResponse(peer_opened=answer))
    with pytest.raises(PlaneError, match=sentence):
        await plane.open()


async def test_a_source_that_leads_nowhere_in_time_is_given_up(memory: DeviceMemory) -> None:
    plane = PeerPlane(memory, Checksums("off"), 0.1, lambda request: None)
    with pytest.raises(PlaneError, match="did not lead to its slab in time"):
        await plane.open()


async def test_the_source_tells_which_slots_were_given_out_anew(memory: DeviceMemory) -> None:
    source, answers = PeerSource(memory), asyncio.Queue[pb.ConnectResponse]()
    loop = asyncio.get_running_loop()

    def ask(slots: list[int], generations: list[int]) -> None:
        check = pb.CheckBlocks(request_id=5, slots=slots, generations=generations, checksum=True)
        source.heard(
            pb.ConnectRequest(check=check), lambda answer: asyncio.run_coroutine_threadsafe(answers.put(answer), loop)
        )

    now = [memory.generation(slot) for slot in range(3)]
    ask([0, 1, 2, PROBE_SLOT], [now[0], now[1] + 1, now[2], 0])
    checked = (await answers.get()).checked
    assert (checked.request_id, list(checked.current)) == (5, [True, False, True, True])
    assert list(checked.checksums) == memory.checksums([0, 1, 2, PROBE_SLOT])
    ask([600], [0])
    assert not (await answers.get()).checked.current
    source.close()


# ---------------------------------------------------------------------- between real stores


async def connected(two: Pair) -> None:
    lease_id, _ = await two.fetch([*FORTY[: 2 * BLOCK], 1])
    await two.reader.worker.run(release(lease_id))
    assert (await two.reader.stats()).peers[0].plane == "peer"


async def test_a_source_that_does_not_serve_it_is_read_by_the_next_plane(tmp_path: Path) -> None:
    async with pair(tmp_path, *PEER, "--planes", "peer,socket", source=("--planes", "socket")) as two:
        await two.source.compute(FORTY)
        _, pulled = await two.fetch([*FORTY, 1])
        assert pulled.cached_tokens == len(FORTY)
        assert (await two.reader.stats()).peers[0].plane == "socket"
        assert "the peer: this node does not serve the plane peer" in two.reader.process.log.read_text()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.003])
async def test_a_source_that_dies_or_hangs_ends_the_pull(tmp_path: Path, how: signal.Signals, after_s: float) -> None:
    async with pair(tmp_path, *PEER) as two:
        await two.source.compute(FORTY)
        await connected(two)
        fetching = asyncio.create_task(two.fetch([*FORTY, 1]))
        await asyncio.sleep(after_s)
        two.source.process.signal(how)
        lease_id, _ = await fetching
        await two.reader.worker.run(release(lease_id))
        figures = await until(two.reader.address, lambda reply: not reply.leases)
        assert figures.free_slots + figures.cached_slots == SLOTS


async def test_a_reader_that_dies_leaves_nothing_held_at_the_source(tmp_path: Path) -> None:
    async with pair(tmp_path, *PEER) as two:
        await two.source.compute(FORTY)
        await connected(two)
        fetching = asyncio.create_task(two.fetch([*FORTY, 1]))
        await asyncio.sleep(0.001)
        two.reader.process.signal(signal.SIGKILL)
        await asyncio.gather(fetching, return_exceptions=True)
        figures = await until(two.source.address, lambda reply: not reply.leases)
        assert figures.free_slots + figures.cached_slots == SLOTS
