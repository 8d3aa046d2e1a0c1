"""The reading side between kvstores: one connection to each other node's store, and the planes it offers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc

from headway.core.keys import join_keys
from headway.runtime.channels import open_channel
from headway.runtime.convert import kv_format_to_proto
from headway.v1 import kvstore_pb2, transfer_pb2_grpc
from headway.v1 import transfer_pb2 as pb
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import SlabMemory
from services.kvstore.node import Node
from services.kvstore.planes.contract import Checksums, Copied, Move, Plane, PlaneError, Urgency
from services.kvstore.planes.grpc_plane import GrpcPlane
from services.kvstore.planes.nixl_plane import NixlPlane
from services.kvstore.planes.peer_plane import PeerPlane
from services.kvstore.planes.probe import probe
from services.kvstore.planes.socket_plane import SocketPlane

log = logging.getLogger(__name__)

CONNECT_S = 3.0
# How long a plane that broke is left alone, unless no other is left; twice as long after each try that failed.
REPAIR_S, MOST_REPAIR_S = 5.0, 300.0
# Whoever asks so soon after a try to reach the peer failed does not try again.
FAIL_FAST_S = 1.0
CLEARLY = 2.0
TRIES = 3


class PeerError(Exception):
    """The peer, or every plane to it, is of no use right now; one sentence."""


@dataclass(slots=True)
class _Link:
    """One life of the connection."""

    channel: grpc.aio.Channel
    welcome: pb.PeerWelcome
    out: asyncio.Queue[pb.ConnectRequest]
    planes: dict[str, Plane] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    held: dict[int, asyncio.Queue[pb.BlocksHeld]] = field(default_factory=dict)
    sockets: dict[int, asyncio.Future[pb.SocketOpened]] = field(default_factory=dict)
    # The last ones that were opened, also before they are among the planes.
    nixl: NixlPlane | None = None
    peer: PeerPlane | None = None
    repair: asyncio.Task[None] | None = None
    repair_later: asyncio.TimerHandle | None = None
    repair_s: float = REPAIR_S
    broken: bool = False

    @property
    def best(self) -> Plane | None:
        """The first plane that works, unless a later one was much faster when probed: probes are noisy."""
        best: Plane | None = None
        for name, plane in self.planes.items():
            if best is None or self.rates[name] > CLEARLY * self.rates[best.name]:
                best = plane
        return best


class Peer:
    """The store at `address`. Connects when it is first needed, and again after a break. Methods raise PeerError."""

    def __init__(self, node: Node, address: str, checksums: Checksums) -> None:
        self._node = node
        self.address = address
        self._checksums = checksums
        self._numbers = itertools.count(1)
        self._link: _Link | None = None
        self._ready: asyncio.Future[_Link] | None = None
        self._failed: tuple[float, str] = (-math.inf, "")
        self._task: asyncio.Task[None] | None = None
        self._reading = 0
        self._reading_since_s = 0.0
        self.figures = kvstore_pb2.PeerStats(address=address)

    # ------------------------------------------------------------------ what pulls ask for

    async def pin(self, pull_id: int, keys: list[bytes], first_block: int, arrival_s: float) -> pb.BlocksHeld:
        """What the peer holds of this chain, from first_block on. `release(pull_id)` ends it."""
        link = await self._connected()
        link.held[pull_id] = asyncio.Queue()
        pin = pb.PinBlocks(pull_id=pull_id, block_keys=join_keys(keys), first_block=first_block, arrival_s=arrival_s)
        link.out.put_nowait(pb.ConnectRequest(pin=pin))
        return await self._next(link, pull_id, CONNECT_S)

    async def follow(
        self, pull_id: int, request: tuple[str, int], first_block: int, done: asyncio.Event, last_word_s: float
    ) -> AsyncIterator[pb.BlocksHeld]:
        """What the peer's prefill of this sequence seals, until its handoff; once `done`, within `last_word_s`."""
        link = await self._connected()
        link.held[pull_id] = asyncio.Queue()
        follow = pb.FollowSequence(pull_id=pull_id, sequence_id=request[0], attempt=request[1], first_block=first_block)
        link.out.put_nowait(pb.ConnectRequest(follow=follow))
        while True:
            held = await self._next(link, pull_id, last_word_s, done)
            yield held
            if held.last:
                return

    def release(self, pull_id: int) -> None:
        """The pull needs nothing of the peer any more."""
        link = self._link
        if link is not None and link.held.pop(pull_id, None) is not None:
            link.out.put_nowait(pb.ConnectRequest(release=pb.ReleasePin(pull_id=pull_id)))

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
                plane = link.best or await self._repaired(link)
                got = await plane.read([moves[at] for at in left], urgency)
                for at, what in zip(left, got, strict=True):
                    copied[at] = what
                left = [at for at in left if copied[at] is Copied.MISSING]
                if not left:
                    break
                self._broke(link, plane)
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

    # ------------------------------------------------------------------ the control stream

    async def _next(
        self, link: _Link, pull_id: int, seconds: float, since: asyncio.Event | None = None
    ) -> pb.BlocksHeld:
        """What the peer tells next of this pull, within `seconds` (of the event, if one is given)."""
        if link.broken:
            raise PeerError(f"the connection to {self.address} broke")
        waiting = asyncio.ensure_future(link.held[pull_id].get())
        happened = asyncio.ensure_future(since.wait()) if since is not None else None
        try:
            if happened is not None:
                await asyncio.wait([waiting, happened], return_when=asyncio.FIRST_COMPLETED)
            held = await asyncio.wait_for(waiting, seconds)
        except TimeoutError:
            raise PeerError(f"{self.address} told nothing more within {seconds:g} s") from None
        finally:
            waiting.cancel()
            if happened is not None:
                happened.cancel()
        if link.broken:
            raise PeerError(f"the connection to {self.address} broke")
        return held

    async def _connected(self) -> _Link:
        if self._ready is None:
            self._fail_fast()
            self._ready = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._live(self._ready))
        # A pull that is given up meanwhile does not end the connecting, which others wait for as well.
        return await asyncio.shield(self._ready)

    async def _live(self, ready: asyncio.Future[_Link]) -> None:
        """Connect, probe the planes, and take what comes until the stream breaks."""
        link: _Link | None = None
        reason = "the stream ended"
        try:
            async with open_channel(self.address) as channel:
                out: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
                call = transfer_pb2_grpc.TransferServiceStub(channel).Connect(self._requests(out))
                async with asyncio.timeout(CONNECT_S):
                    first = await call.read()
                if not isinstance(first, pb.ConnectResponse) or not first.HasField("welcome"):
                    raise PeerError(f"{self.address} did not welcome this store")
                link = _Link(channel, first.welcome, out)
                self.figures.node_id = first.welcome.node_id
                reading = asyncio.create_task(self._take(call, link))
                try:
                    await self._open_planes(link)
                    self._link = link
                    ready.set_result(link)
                    await reading
                finally:
                    reading.cancel()
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except (PeerError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
        finally:
            self._ended(link, ready, reason)

    def _ended(self, link: _Link | None, ready: asyncio.Future[_Link], reason: str) -> None:
        log.info("peer=%s event=disconnected reason=%s", self.address, reason)
        self._link = self._ready = None
        self.figures.plane = ""
        if not ready.done():
            self._failed = (time.monotonic(), f"no connection to {self.address}: {reason}")
            ready.set_exception(PeerError(self._failed[1]))
            # Whoever waited for it may be gone.
            ready.exception()
        if link is not None:
            link.broken = True
            if link.repair is not None:
                link.repair.cancel()
            if link.repair_later is not None:
                link.repair_later.cancel()
            for plane in link.planes.values():
                plane.close()
            for opened_last in (link.nixl, link.peer):
                if opened_last is not None:
                    opened_last.close()
            for queue in link.held.values():
                queue.put_nowait(pb.BlocksHeld())
            for opened in link.sockets.values():
                if not opened.done():
                    opened.set_exception(PlaneError("the connection broke"))
                    # Whoever waited for it may be gone.
                    opened.exception()

    async def _requests(self, out: asyncio.Queue[pb.ConnectRequest]) -> AsyncIterator[pb.ConnectRequest]:
        node = self._node
        assert node.kv_format is not None
        kv_format = kv_format_to_proto(node.kv_format)
        yield pb.ConnectRequest(hello=pb.PeerHello(node_id=node.config.node_id, kv_format=kv_format))
        while True:
            yield await out.get()

    async def _take(self, call: grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse], link: _Link) -> None:
        while isinstance(response := await call.read(), pb.ConnectResponse):
            if response.HasField("held"):
                if queue := link.held.get(response.held.pull_id):
                    queue.put_nowait(response.held)
            elif response.HasField("nixl_opened") or response.HasField("nixl_moved"):
                if link.nixl is not None:
                    link.nixl.heard(response)
            elif response.HasField("peer_opened") or response.HasField("checked"):
                if link.peer is not None:
                    link.peer.heard(response)
            elif (opened := link.sockets.pop(response.socket.request_id, None)) and not opened.done():
                opened.set_result(response.socket)

    # ------------------------------------------------------------------ planes

    async def _open_planes(self, link: _Link) -> None:
        """Open and probe every plane that is not there. Raises PeerError when none works."""
        wanted = self._node.config.planes
        for name in wanted:
            if name not in link.planes:
                await self._open_probed(name, link)
        link.planes = {name: link.planes[name] for name in wanted if name in link.planes}
        if len(link.planes) < len(wanted):
            self._repair_later(link)
            link.repair_s = min(2 * link.repair_s, MOST_REPAIR_S)
        else:
            link.repair_s = REPAIR_S
        if link.best is None:
            self._failed = (time.monotonic(), f"no plane works to {self.address}; tried {', '.join(wanted)}")
            raise PeerError(self._failed[1])
        self._chose(link)

    async def _open_probed(self, name: str, link: _Link) -> None:
        plane: Plane | None = None
        try:
            plane = await self._open(name, link)
            link.rates[name] = await probe(plane, self._node.memory)
        except BaseException as error:
            if plane is not None:
                plane.close()
            if not isinstance(error, PlaneError):
                raise
            log.warning("peer=%s plane=%s event=plane_failed reason=%s", self.address, name, error)
        else:
            link.planes[name] = plane

    async def _open(self, name: str, link: _Link) -> Plane:
        node, timeout_s = self._node, self._node.config.transfer_timeout_s
        if name == "grpc":
            by_grpc = GrpcPlane(node.memory, self._checksums, timeout_s)
            by_grpc.open(link.channel, link.welcome.secret)
            return by_grpc
        if name == "nixl":
            assert isinstance(node.memory, SlabMemory | DeviceMemory)
            link.nixl = NixlPlane(node.memory, self._checksums, timeout_s, link.out.put_nowait)
            await link.nixl.open(node.config.node_id)
            return link.nixl
        if name == "peer":
            if not isinstance(node.memory, DeviceMemory):
                raise PlaneError("the plane peer is for slabs on devices")
            link.peer = PeerPlane(node.memory, self._checksums, timeout_s, link.out.put_nowait)
            await link.peer.open()
            return link.peer
        by_socket = SocketPlane(node.memory, self._checksums, timeout_s)

        async def ask() -> tuple[int, bytes]:
            number = next(self._numbers)
            opened = link.sockets[number] = asyncio.get_running_loop().create_future()
            link.out.put_nowait(pb.ConnectRequest(open_socket=pb.OpenSocket(request_id=number)))
            try:
                async with asyncio.timeout(CONNECT_S):
                    answer = await opened
            except TimeoutError:
                raise PlaneError("the peer gave no secret in time") from None
            return answer.port, answer.secret

        await by_socket.open(self.address.rpartition(":")[0], ask, node.config.connections)
        return by_socket

    def _broke(self, link: _Link, plane: Plane) -> None:
        if link.planes.get(plane.name) is plane:
            del link.planes[plane.name]
            plane.close()
            self.figures.fallbacks += 1
            log.warning("peer=%s plane=%s event=plane_broke", self.address, plane.name)
            self._chose(link)
            link.repair_s = REPAIR_S
            self._repair_later(link)

    def _repair_later(self, link: _Link) -> None:
        if link.repair_later is not None:
            link.repair_later.cancel()
        link.repair_later = asyncio.get_running_loop().call_later(link.repair_s, self._repair, link)

    def _repair(self, link: _Link) -> asyncio.Task[None]:
        """Open again what broke, in a task of its own: pulls that wait for it may be given up."""
        if link.repair_later is not None:
            link.repair_later.cancel()
            link.repair_later = None
        if link.repair is None or link.repair.done():
            link.repair = asyncio.create_task(self._open_planes(link))
            link.repair.add_done_callback(lambda done: done.cancelled() or done.exception())
        return link.repair

    async def _repaired(self, link: _Link) -> Plane:
        """Raises PeerError when no plane works."""
        self._fail_fast()
        repair = self._repair(link)
        await asyncio.wait([repair])
        if repair.cancelled() or link.best is None:
            raise PeerError(f"no plane works to {self.address}")
        return link.best

    def _fail_fast(self) -> None:
        failed_s, reason = self._failed
        if time.monotonic() - failed_s < FAIL_FAST_S:
            raise PeerError(reason)

    def _chose(self, link: _Link) -> None:
        plane = link.best
        self.figures.plane = plane.name if plane else ""
        self.figures.probe_bytes_per_s = link.rates[plane.name] if plane else 0.0
        if plane is not None:
            log.info(
                "peer=%s node=%s event=plane plane=%s gb_per_s=%.2f of=%s",
                self.address, link.welcome.node_id, plane.name, link.rates[plane.name] / 1e9, ",".join(link.planes),
            )  # fmt: skip
