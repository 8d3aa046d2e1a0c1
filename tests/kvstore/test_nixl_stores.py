"""The NIXL plane between real kvstores: killed, stopped and cut in the middle; refused where NIXL cannot serve."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.runtime.channels import open_channel
from headway.runtime.convert import kv_format_to_proto
from headway.slab.host import HostSegment
from headway.v1 import transfer_pb2 as pb
from headway.v1 import transfer_pb2_grpc
from services.kvstore.memory import PROBE_SLOT, SlabMemory
from services.kvstore.planes.contract import Checksums, Copied, Move
from services.kvstore.planes.nixl_agent import MODULES
from services.kvstore.planes.nixl_plane import NixlPlane
from tests.kvstore.faulty import cut_connections, listens_at
from tests.kvstore.nixl_rig import NOW
from tests.kvstore.pulling import BLOCK, SLOT_BYTES, SLOTS, WIDE, Pair, pair
from tests.kvstore.rig import attached, kvstore, release, running, rust_built, until

needs_nixl = pytest.mark.nixl
# The first agent of a process takes its time, and longer beside other work.
OPEN_S = 4.0


@pytest.mark.skipif(any(map(importlib.util.find_spec, MODULES)), reason="NIXL is installed")
def test_naming_nixl_without_the_package_says_what_to_do() -> None:
    check_refusal(os.environ.copy())


def test_naming_nixl_where_it_cannot_be_imported_says_what_to_do(tmp_path: Path) -> None:
    """Everywhere: a package of each name that cannot be imported stands in front."""
    for module in MODULES:
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise ImportError('no such library')\n")
    check_refusal({**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])})


def test_transports_that_could_write_too_late_are_refused_at_the_start() -> None:
    (line,) = refusal({**os.environ, "UCX_TLS": "all"})
    assert line.startswith("headway-kvstore: UCX_TLS=all allows all")


@needs_nixl
def test_an_agent_that_cannot_be_made_is_no_surprise_for_readers() -> None:
    # UCX has its own say before.
    *_, line = refusal({**os.environ, "UCX_TLS": "no_such_transport"})
    assert line.startswith("headway-kvstore: the plane nixl cannot make an agent")


EXITS = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.on_exit(ctypes.cast(libc.abort, ctypes.c_void_p), None)
from services.kvstore.planes.nixl_agent import check_nixl
check_nixl("127.0.0.1")
sys.exit(7)
"""


@needs_nixl
def test_what_runs_after_python_at_exit_does_not_change_the_status() -> None:
    """With libibverbs installed, a destructor of NIXL's libraries crashes there; `abort` stands for it elsewhere."""
    ended = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 7, ended.stderr


def check_refusal(env: dict[str, str]) -> None:
    (line,) = refusal(env)
    assert line.startswith("headway-kvstore: the plane nixl needs the package NIXL, which cannot be imported")
    assert line.endswith("install the extra (pip install 'headway[nixl]'), or leave nixl out of the setting planes")


def refusal(env: dict[str, str]) -> list[str]:
    """What a kvstore says that does not start."""
    command = [sys.executable, "-m", "services.kvstore.server", "--planes", "nixl,grpc", "--port", "0"]
    command += ["--slab-name", f"headway-test-{uuid.uuid4().hex[:8]}", "--slab-bytes", str(1 << 20)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    return ended.stderr.splitlines()


FORTY = list(range(40 * BLOCK))


@needs_nixl
async def test_two_kvstores_move_a_prefix(tmp_path: Path) -> None:
    async with pair(tmp_path, "--planes", "nixl,grpc") as two:
        await two.source.compute(FORTY)
        lease_id, pulled = await two.fetch([*FORTY, 1])
        assert (pulled.cached_tokens, pulled.bytes) == (len(FORTY), 40 * SLOT_BYTES)
        (peer,) = (await two.reader.stats()).peers
        assert (peer.plane, peer.blocks, peer.fallbacks) == ("nixl", 40, 0)
        assert rust_built(two.source.process.pid) == rust_built(two.reader.process.pid) == []
        await two.reader.worker.run(release(lease_id))
        figures = await until(two.reader.address, lambda reply: not reply.leases)
        assert figures.free_slots + figures.cached_slots == SLOTS


@needs_nixl
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01])
async def test_a_source_that_is_gone_in_the_middle_costs_time_and_no_slot(
    tmp_path: Path, number: signal.Signals, after_s: float
) -> None:
    async with pair(tmp_path, "--planes", "nixl,grpc") as two:
        await two.source.compute(FORTY)
        await connected(two)
        fetching = asyncio.create_task(two.fetch([*FORTY, 1]))
        await asyncio.sleep(after_s)
        two.source.process.signal(number)
        started = time.monotonic()
        # Checks that what is said to be there is right.
        lease_id, _ = await fetching
        assert time.monotonic() - started < 12
        await two.reader.worker.run(release(lease_id))
        figures = await until(two.reader.address, lambda reply: not reply.leases and not reply.transfers_in_flight)
        assert figures.free_slots + figures.cached_slots == SLOTS


@needs_nixl
@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01])
async def test_a_reader_that_is_killed_in_the_middle_does_not_disturb_the_source(
    tmp_path: Path, after_s: float
) -> None:
    async with pair(tmp_path, "--planes", "nixl,grpc") as two:
        await two.source.compute(FORTY)
        await connected(two)
        fetching = asyncio.create_task(two.fetch([*FORTY, 1]))
        await asyncio.sleep(after_s)
        two.reader.process.signal(signal.SIGKILL)
        await asyncio.gather(fetching, return_exceptions=True)
        figures = await until(two.source.address, lambda reply: not reply.leases)
        assert figures.free_slots + figures.cached_slots == SLOTS
        # UCX notices a dead peer after a while.
        await asyncio.sleep(2.0)
        assert (await two.source.stats()).cached_slots == figures.cached_slots


@needs_nixl
@pytest.mark.parametrize("after_s", [None, 0.0, 0.002, 0.01], ids=str)
async def test_a_connection_that_is_cut_costs_one_fallback_and_no_block(tmp_path: Path, after_s: float | None) -> None:
    """UCX's own connections between the kvstores: before the blocks are asked for (None), or about when they come."""
    async with pair(tmp_path, "--planes", "nixl,grpc") as two:
        await two.source.compute(FORTY)
        await connected(two)
        if after_s is None:
            cut(two)
        fetching = asyncio.create_task(two.fetch([*FORTY, 1]))
        if after_s is not None:
            await asyncio.sleep(after_s)
            cut(two)
        lease_id, pulled = await fetching
        assert pulled.cached_tokens == len(FORTY)
        (peer,) = (await two.reader.stats()).peers
        assert peer.fallbacks <= 1
        assert peer.fallbacks == 1 or after_s is not None
        assert peer.plane == ("grpc" if peer.fallbacks else "nixl")
        await two.reader.worker.run(release(lease_id))
        for side in (two.source, two.reader):
            figures = await until(side.address, lambda reply: not reply.leases)
            assert figures.free_slots + figures.cached_slots == SLOTS


@needs_nixl
async def test_ucx_listens_on_loopback_where_transfers_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES")
    async with pair(tmp_path, "--planes", "nixl,grpc") as two:
        await two.source.compute(FORTY)
        await connected(two)
        (peer,) = (await two.reader.stats()).peers
        assert peer.plane == "nixl"
        for side in (two.source, two.reader):
            try:
                hosts = listens_at(side.process.pid)
                assert {host.removeprefix("::ffff:") for host in hosts} == {"127.0.0.1"}
            except PermissionError:
                pytest.skip("the kernel hands out no sockets of children")


async def connected(two: Pair) -> None:
    """And probed, so that the next blocks move at once."""
    lease_id, _ = await two.fetch([*FORTY[: 2 * BLOCK], 1])
    await two.reader.worker.run(release(lease_id))


def cut(two: Pair) -> None:
    try:
        assert cut_connections(two.source.process.pid, two.reader.process.pid)
    except PermissionError:
        pytest.skip("the kernel hands out no sockets of children")


@asynccontextmanager
async def own_reader(address: str) -> AsyncIterator[tuple[NixlPlane, SlabMemory]]:
    """This process reads from a kvstore, into a slab of its own."""
    segment = HostSegment(f"headway-test-{uuid.uuid4().hex[:8]}", SLOTS * SLOT_BYTES)
    memory = SlabMemory(segment.descriptor, segment.size)
    memory.lay_out(SLOT_BYTES, SLOT_BYTES, SlotPool(ForgetfulRecords(SLOTS)))
    out: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
    out.put_nowait(pb.ConnectRequest(hello=pb.PeerHello(node_id="reader", kv_format=kv_format_to_proto(WIDE))))

    async def requests() -> AsyncIterator[pb.ConnectRequest]:
        while True:
            yield await out.get()

    async with open_channel(address) as channel:
        call = transfer_pb2_grpc.TransferServiceStub(channel).Connect(requests())
        plane = NixlPlane(memory, Checksums("off"), OPEN_S, out.put_nowait)

        async def hear() -> None:
            while isinstance(response := await call.read(), pb.ConnectResponse):
                if not response.HasField("welcome"):
                    plane.heard(response)

        hearing = asyncio.create_task(hear())
        await plane.open("reader")
        yield plane, memory
        plane.close()
        hearing.cancel()
        call.cancel()
    segment.remove()


@needs_nixl
@pytest.mark.parametrize("transports", ["tcp", ""], ids=["tcp", "UCX's choice"])
async def test_a_source_that_wakes_up_late_writes_nothing(
    tmp_path: Path, transports: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped with the request in its socket, and finds it when the reader has given up and reused the slots."""
    monkeypatch.setenv("UCX_TLS", transports)
    process = kvstore(tmp_path, SLOTS * SLOT_BYTES, "--planes", "nixl")
    with running(process):
        async with attached(process.address, kv_format=WIDE), own_reader(process.address) as (plane, memory):
            everywhere = [Move(PROBE_SLOT, 0, slot) for slot in range(SLOTS)]
            assert await plane.read(everywhere, NOW) == [Copied.GOOD] * SLOTS
            process.signal(signal.SIGSTOP)
            assert await plane.read(everywhere, NOW) == [Copied.MISSING] * SLOTS
            for slot in range(SLOTS):
                memory.view(slot)[:] = bytes(SLOT_BYTES)
            process.signal(signal.SIGCONT)
            await asyncio.sleep(1)
            assert process.alive
            assert all(memory.view(slot) == bytes(SLOT_BYTES) for slot in range(SLOTS))
