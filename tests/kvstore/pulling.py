"""Two real kvstores, a worker at each (played by the test), and between them relays that can spoil what passes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headway.core.keys import block_keys, join_keys
from headway.core.model import KvFormat, LayerGroup
from headway.fleet.process import ServiceProcess
from headway.v1 import kvstore_pb2 as pb
from tests.kvstore.faulty import Relay
from tests.kvstore.rig import BLOCK, Peer, attached, kvstore, running, stats

# 32 KiB a block.
WIDE = KvFormat(BLOCK, "uint64", "token", (LayerGroup(1, 256, 1, 2048),))
SLOT_BYTES = WIDE.slot_bytes
SLOTS = 64
NAMESPACE = b"n"
# Where the relay stands: the reader is told this host, and goes to the same ports there.
RELAY_HOST = "127.0.0.2"


def content(tokens: list[int], block: int) -> npt.NDArray[np.uint8]:
    """What belongs into the block of a sequence: a function of all tokens up to its end."""
    seed = hash(tuple(tokens[: (block + 1) * BLOCK])) & 0xFFFFFFFF
    return np.random.default_rng(seed).integers(0, 256, SLOT_BYTES, np.uint8)


@dataclass
class Side:
    """A store and the worker at it."""

    process: ServiceProcess
    worker: Peer
    slab: npt.NDArray[np.uint8]

    @property
    def address(self) -> str:
        return self.process.address

    def write(self, slots: list[int], tokens: list[int]) -> None:
        """As an engine does: the content of each block that has tokens."""
        for block in range(-(-len(tokens) // BLOCK)):
            self.slab[slots[block], :SLOT_BYTES] = content(tokens, block)

    def check(self, slots: list[int], tokens: list[int], cached_tokens: int) -> None:
        """The leading blocks that are said to be there hold what they must."""
        for block in range(-(-cached_tokens // BLOCK)):
            assert (self.slab[slots[block], :SLOT_BYTES] == content(tokens, block)).all(), block

    async def compute(self, tokens: list[int], request: str = "s", joiner: str = "", hand_off: bool = False) -> int:
        """Acquire, write and seal all of it; then release it, or hand it off. The lease's number."""
        keys = join_keys(block_keys(NAMESPACE, tokens, BLOCK))
        (granted,) = await self.worker.run(acquire(tokens, request, joiner=joiner))
        lease = granted.granted
        self.write(list(lease.slots), tokens)
        seal = pb.SealBlocks(lease_id=lease.lease_id, block_keys=keys)
        end = (
            pb.AttachOperation(hand_off=pb.HandOffLease(lease_id=lease.lease_id))
            if hand_off
            else pb.AttachOperation(release=pb.ReleaseLease(lease_id=lease.lease_id))
        )
        replies = await self.worker.run(pb.AttachOperation(seal=seal), end)
        assert not any(reply.HasField("failure") for reply in replies), replies
        return lease.lease_id

    async def pulled(self, lease_id: int, seconds: float = 30.0) -> pb.LeasePulled:
        """What the store says when fetching for this lease is over."""
        async with asyncio.timeout(seconds):
            while True:
                for push in self.worker.pushes:
                    if push.HasField("pulled") and push.pulled.lease_id == lease_id:
                        return push.pulled
                assert not await self.worker.read()

    async def stats(self) -> pb.StatsResponse:
        return await stats(self.address)


def acquire(
    tokens: list[int], request: str = "s", *, joiner: str = "", pull: pb.PullBlocks | None = None
) -> pb.AttachOperation:
    keys = join_keys(block_keys(NAMESPACE, tokens, BLOCK))
    return pb.AttachOperation(
        acquire=pb.AcquireLease(
            sequence_id=request, block_keys=keys, tokens=len(tokens), growth_tokens=1, joiner=joiner, timeout_s=5.0,
            pull=pull,
        )
    )  # fmt: skip


@dataclass
class Pair:
    """Blocks go from `source` to `reader`."""

    source: Side
    reader: Side
    # The ways that gRPC and the socket plane's bytes take.
    control: Relay
    data: Relay

    @property
    def via(self) -> str:
        """The source's address as the reader is to know it."""
        return f"{RELAY_HOST}:{self.source.address.rpartition(':')[2]}"

    async def fetch(self, tokens: list[int], *, follow: bool = False, request: str = "s") -> tuple[int, pb.LeasePulled]:
        """The reader's worker asks for this sequence, its prefix to be fetched. Checks what it gets."""
        pull = pb.PullBlocks(kvstore=self.via, blocks=len(tokens) // BLOCK, follow=follow)
        (granted,) = await self.reader.worker.run(acquire(tokens, request, pull=pull))
        lease_id = granted.granted.lease_id
        pulled = await self.reader.pulled(lease_id)
        self.reader.check(list(pulled.slots), tokens, pulled.cached_tokens)
        return lease_id, pulled


@asynccontextmanager
async def pair(tmp_path: Path, *flags: str, source: tuple[str, ...] = ()) -> AsyncIterator[Pair]:
    """`source`: flags for that side only, which come last and count."""
    async with AsyncExitStack() as stack:
        data_port = free_port()
        sides = []
        for name, port in (("source", data_port), ("reader", 0)):
            (tmp_path / name).mkdir()
            node = ("--node-id", name, "--checksum", "all", "--transfer-timeout-s", "1", "--transfer-port", str(port))
            own = source if name == "source" else ()
            process = kvstore(tmp_path / name, SLOTS * SLOT_BYTES, *node, *flags, *own)
            stack.enter_context(running(process))
            worker = await stack.enter_async_context(attached(process.address, f"worker-{name}", kv_format=WIDE))
            sides.append(Side(process, worker, worker.map()))
        relays = []
        for port in (int(sides[0].address.rpartition(":")[2]), data_port):
            relays.append(Relay(port, RELAY_HOST, port))
            stack.callback(relays[-1].close)
        yield Pair(*sides, *relays)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port
