"""A real kvstore process, and a worker of a few lines that attaches to it from this process."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headway.core.keys import block_keys, join_keys
from headway.core.model import KvFormat
from headway.engine.simulated import simulated_card
from headway.fleet.process import ServiceProcess
from headway.runtime.channels import open_channel
from headway.runtime.convert import kv_format_to_proto
from headway.slab.descriptor import fetch_descriptor, fetch_handle
from headway.slab.device import DeviceMapping, open_device
from headway.slab.host import map_descriptor
from headway.v1 import kvstore_pb2 as pb
from headway.v1 import kvstore_pb2_grpc

FORMAT = simulated_card().kv_format
BLOCK = 16
RUST = (b"/rustc/", b"rust_panic", b"rust_eh_personality")


def kvstore(run_dir: Path, slab_bytes: int = 256 << 10, *flags: str) -> ServiceProcess:
    """Not yet started. 256 KiB make 64 slots."""
    name = f"headway-test-{uuid.uuid4().hex[:8]}"
    settings = ["--slab-bytes", str(slab_bytes), "--slab-name", name, "--run-dir", str(run_dir), *flags]
    return ServiceProcess("kvstore", "kvstore", settings, {}, run_dir, 0)


def slab_file(process: ServiceProcess) -> Path:
    flags = process._flags
    return Path("/dev/shm") / flags[flags.index("--slab-name") + 1]


@contextmanager
def running(process: ServiceProcess) -> Iterator[ServiceProcess]:
    """Started, listening, and killed in the end."""
    process.start()
    try:
        process.wait_listening(time.monotonic() + 30)
        yield process
    finally:
        process.signal(signal.SIGCONT)
        process.signal(signal.SIGKILL)
        process.wait_ended(time.monotonic() + 5)
        for path in slab_file(process).parent.glob(f"{slab_file(process).name}*"):
            path.unlink()


class Peer:
    """One Attach stream. `messages` counts those received after the welcome."""

    def __init__(self, call: Any, welcome: pb.AttachWelcome) -> None:
        self.call = call
        self.welcome = welcome
        self.messages = 0
        self.pushes: list[pb.AttachReply] = []
        self._last = 0
        self._writing = asyncio.Lock()

    async def renew(self) -> None:
        """Signs of life, as workers give them."""
        while True:
            await asyncio.sleep(0.5)
            await self.write(pb.AttachOperation(renew=pb.RenewLeases()))

    async def write(self, *operations: pb.AttachOperation) -> None:
        async with self._writing:
            await self.call.write(pb.AttachRequest(operations=pb.AttachOperations(operations=operations)))

    def map(self) -> npt.NDArray[np.uint8]:
        """The slab, as a worker in this process sees it."""
        if self.welcome.HasField("device"):
            return self._map_device()
        descriptor = fetch_descriptor(self.welcome.socket_path, self.welcome.secret)
        try:
            return map_descriptor(descriptor, self.welcome.total_slots, self.welcome.slot_stride)
        finally:
            os.close(descriptor)

    def _map_device(self) -> npt.NDArray[np.uint8]:
        welcome = self.welcome
        device = open_device(f"{welcome.device.kind}:{welcome.device.index}")
        assert device is not None
        assert device.bus_id == welcome.device.bus_id
        mapping = DeviceMapping(device, fetch_handle(welcome.socket_path, welcome.secret), welcome.device.bytes)
        view: npt.NDArray[np.uint8] = mapping.view(welcome.total_slots, welcome.slot_stride)
        return view

    async def run(self, *operations: pb.AttachOperation) -> list[pb.AttachReply]:
        """Send in one message; the replies, in order of the operations."""
        for operation in operations:
            self._last += 1
            operation.operation_id = self._last
        first = self._last - len(operations) + 1
        await self.write(*operations)
        replies: dict[int, pb.AttachReply] = {}
        while len(replies) < len(operations):
            for reply in await self.read():
                replies[reply.operation_id] = reply
        return [replies[first + at] for at in range(len(operations))]

    async def read(self) -> list[pb.AttachReply]:
        response = await asyncio.wait_for(self.call.read(), 10)
        self.messages += 1
        self.pushes += [reply for reply in response.replies.replies if not reply.operation_id]
        return [reply for reply in response.replies.replies if reply.operation_id]


@asynccontextmanager
async def attached(
    address: str, worker_id: str = "w", *, incarnation: str = "", kv_format: KvFormat = FORMAT
) -> AsyncIterator[Peer]:
    async with open_channel(address) as channel:
        call: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel).Attach()
        hello = pb.AttachHello(
            worker_id=worker_id,
            pid=os.getpid(),
            kv_format=kv_format_to_proto(kv_format),
            incarnation=incarnation or uuid.uuid4().hex,
        )
        await call.write(pb.AttachRequest(hello=hello))
        peer = Peer(call, (await call.read()).welcome)
        renewing = asyncio.create_task(peer.renew())
        yield peer
        renewing.cancel()
        call.cancel()


def acquire(tokens: list[int], growth: int = 0, arrival_s: float = 0.0, joiner: str = "") -> pb.AttachOperation:
    keys = join_keys(block_keys(b"n", tokens, BLOCK))
    return pb.AttachOperation(
        acquire=pb.AcquireLease(
            sequence_id="s", block_keys=keys, tokens=len(tokens), growth_tokens=growth, arrival_s=arrival_s,
            joiner=joiner, timeout_s=5.0,
        )
    )  # fmt: skip


def seal(lease_id: int, tokens: list[int]) -> pb.AttachOperation:
    keys = join_keys(block_keys(b"n", tokens, BLOCK))
    return pb.AttachOperation(seal=pb.SealBlocks(lease_id=lease_id, first_block=0, block_keys=keys))


def release(lease_id: int) -> pb.AttachOperation:
    return pb.AttachOperation(release=pb.ReleaseLease(lease_id=lease_id))


async def stats(address: str, **fields: bool) -> pb.StatsResponse:
    async with open_channel(address) as channel:
        reply = await kvstore_pb2_grpc.KvStoreServiceStub(channel).Stats(
            pb.StatsRequest(check_integrity=True, **fields)
        )
    assert not reply.integrity_errors
    return reply


async def until(address: str, holds: Callable[[pb.StatsResponse], bool], seconds: float = 10.0) -> pb.StatsResponse:
    """The store's figures once `holds` says yes of them."""
    async with asyncio.timeout(seconds):
        while not holds(reply := await stats(address)):
            await asyncio.sleep(0.02)
    return reply


def rust_built(pid: int | str) -> list[str]:
    """The shared objects mapped by a process that bear a mark of the Rust compiler."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    files = {Path(line.split(maxsplit=5)[5]) for line in lines if len(line.split(maxsplit=5)) == 6}
    objects = [file for file in files if ".so" in file.name and file.is_file()]
    assert objects
    return [str(file) for file in objects if any(mark in file.read_bytes() for mark in RUST)]
