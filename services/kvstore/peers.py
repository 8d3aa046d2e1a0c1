"""The reading side between kvstores: another node's store, connected to when it is needed and again after a break."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence

import grpc

from headway.core.keys import join_keys
from headway.runtime.channels import open_channel
from headway.runtime.convert import kv_format_to_proto
from headway.v1 import kvstore_pb2, transfer_pb2_grpc
from headway.v1 import transfer_pb2 as pb
from services.kvstore.node import Node
from services.kvstore.peer_link import CONNECT_S, LastFailure, Link, PeerError
from services.kvstore.planes.contract import Checksums, Copied, Move, Urgency

log = logging.getLogger(__name__)

TRIES = 3


class Peer:
    """The store at `address`. Methods raise PeerError."""

    def __init__(self, node: Node, address: str, checksums: Checksums) -> None:
        self._node = node
        self.address = address
        self._checksums = checksums
        self._link: Link | None = None
        self._ready: asyncio.Future[Link] | None = None
        self._failure = LastFailure()
        self._task: asyncio.Task[None] | None = None
        self._reading = 0
        self._reading_since_s = 0.0
        self.figures = kvstore_pb2.PeerStats(address=address)

    # ------------------------------------------------------------------ what pulls ask for

    async def pin(self, pull_id: int, keys: list[bytes], first_block: int, arrival_s: float) -> pb.BlocksHeld:
        """What the peer holds of this chain, from first_block on. `release(pull_id)` ends it."""
        link = await self._connected()
        pin = pb.PinBlocks(pull_id=pull_id, block_keys=join_keys(keys), first_block=first_block, arrival_s=arrival_s)
        link.ask(pull_id, pb.ConnectRequest(pin=pin))
        return await link.told(pull_id, CONNECT_S)

    async def follow(
        self, pull_id: int, request: tuple[str, int], first_block: int, done: asyncio.Event, last_word_s: float
    ) -> AsyncIterator[pb.BlocksHeld]:
        """What the peer's prefill of this sequence seals, until its handoff; once `done`, within `last_word_s`."""
        link = await self._connected()
        follow = pb.FollowSequence(pull_id=pull_id, sequence_id=request[0], attempt=request[1], first_block=first_block)
        link.ask(pull_id, pb.ConnectRequest(follow=follow))
        while True:
            held = await link.told(pull_id, last_word_s, done)
            yield held
            if held.last:
                return

    def release(self, pull_id: int) -> None:
        """The pull needs nothing of the peer any more."""
        if self._link is not None:
            self._link.forget(pull_id)

    async def read(self, epoch: int, moves: Sequence[Move], urgency: Urgency) -> list[Copied]:
        """Copy blocks by the fastest plane; where it breaks, what is missing comes by the next one.

        `epoch`: of the peer when it told of these slots; another one may have given them the same generations.
        """
        copied = [Copied.MISSING] * len(moves)
        left = list(range(len(moves)))
        self._busy(1)
        try:
            for _ in range(TRIES):
                link = await self._connected()
                if link.welcome.epoch != epoch:
                    raise PeerError(f"{self.address} started anew")
                plane = await link.plane()
                got = await plane.read([moves[at] for at in left], urgency)
                for at, what in zip(left, got, strict=True):
                    copied[at] = what
                left = [at for at in left if copied[at] is Copied.MISSING]
                if not left:
                    break
                link.broke(plane)
        finally:
            self._busy(-1)
        good = copied.count(Copied.GOOD)
        self.figures.blocks += good
        self.figures.bytes += good * self._node.memory.slot_bytes
        self._node.corrupt_blocks += copied.count(Copied.CORRUPT)
        self._node.stale_blocks += copied.count(Copied.STALE)
        if left:
            raise PeerError(f"{len(left)} blocks did not come from {self.address} by any plane")
        return copied

    def _busy(self, change: int) -> None:
        now = time.monotonic()
        if self._reading:
            self.figures.busy_s += now - self._reading_since_s
        self._reading += change
        self._reading_since_s = now

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # ------------------------------------------------------------------ the connection

    async def _connected(self) -> Link:
        if self._ready is None:
            self._failure.check()
            self._ready = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._live(self._ready))
        # A pull that is given up meanwhile does not end the connecting, which others wait for as well.
        return await asyncio.shield(self._ready)

    async def _live(self, ready: asyncio.Future[Link]) -> None:
        """Connect, probe the planes, and take what comes until the stream breaks."""
        link: Link | None = None
        reason = "the stream ended"
        try:
            async with open_channel(self.address) as channel:
                out: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
                call = transfer_pb2_grpc.TransferServiceStub(channel).Connect(self._requests(out))
                welcome = await self._welcomed(call)
                self.figures.node_id = welcome.node_id
                link = Link(self._node, self._checksums, self.figures, self._failure, channel, welcome, out)
                listening = asyncio.create_task(link.listen(call))
                try:
                    await link.open_planes()
                    self._link = link
                    ready.set_result(link)
                    await listening
                finally:
                    listening.cancel()
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except (PeerError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
        finally:
            self._ended(link, ready, reason)

    async def _welcomed(self, call: grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]) -> pb.PeerWelcome:
        async with asyncio.timeout(CONNECT_S):
            first = await call.read()
        if not isinstance(first, pb.ConnectResponse) or not first.HasField("welcome"):
            raise PeerError(f"{self.address} did not welcome this store")
        return first.welcome

    def _ended(self, link: Link | None, ready: asyncio.Future[Link], reason: str) -> None:
        log.info("peer=%s event=disconnected reason=%s", self.address, reason)
        self._link = self._ready = None
        self.figures.plane = ""
        if not ready.done():
            ready.set_exception(self._failure.record(f"no connection to {self.address}: {reason}"))
            # Whoever waited for it may be gone.
            ready.exception()
        if link is not None:
            link.close()

    async def _requests(self, out: asyncio.Queue[pb.ConnectRequest]) -> AsyncIterator[pb.ConnectRequest]:
        node = self._node
        assert node.kv_format is not None
        kv_format = kv_format_to_proto(node.kv_format)
        yield pb.ConnectRequest(hello=pb.PeerHello(node_id=node.config.node_id, kv_format=kv_format))
        while True:
            yield await out.get()
