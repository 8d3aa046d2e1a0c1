"""One life of the connection to another store, and the planes over it: probed, chosen, repaired when they break."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time

import grpc

from headway.v1 import kvstore_pb2
from headway.v1 import transfer_pb2 as pb
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import SlabMemory
from services.kvstore.node import Node
from services.kvstore.planes.contract import Checksums, Plane, PlaneError
from services.kvstore.planes.grpc_plane import GrpcPlane
from services.kvstore.planes.nixl_plane import NixlPlane
from services.kvstore.planes.peer_plane import PeerPlane
from services.kvstore.planes.probe import probe
from services.kvstore.planes.socket_plane import SocketPlane

log = logging.getLogger(__name__)

# How long the peer has to welcome, and to answer a question.
CONNECT_S = 3.0
# How long a plane that broke is left alone, unless no other is left; twice as long after each try that failed.
REPAIR_S, MOST_REPAIR_S = 5.0, 300.0
# Whoever asks so soon after a try to reach the peer failed does not try again.
FAIL_FAST_S = 1.0
CLEARLY = 2.0


class PeerError(Exception):
    """The peer, or every plane to it, is of no use right now; one sentence."""


class LastFailure:
    """When the peer was last found to be of no use: those who ask at once are told so, not made to wait in turn."""

    def __init__(self) -> None:
        self._at_s, self._reason = -math.inf, ""

    def record(self, reason: str) -> PeerError:
        """It failed. Returns what to raise."""
        self._at_s, self._reason = time.monotonic(), reason
        return PeerError(reason)

    def check(self) -> None:
        """Raises PeerError when it was less than FAIL_FAST_S ago."""
        if time.monotonic() - self._at_s < FAIL_FAST_S:
            raise PeerError(self._reason)


class Link:
    """The connection of this node to the peer whose `figures` these are, from the peer's welcome until it breaks."""

    def __init__(
        self,
        node: Node,
        checksums: Checksums,
        figures: kvstore_pb2.PeerStats,
        failure: LastFailure,
        channel: grpc.aio.Channel,
        welcome: pb.PeerWelcome,
        out: asyncio.Queue[pb.ConnectRequest],
    ) -> None:
        self._node, self._checksums, self._figures, self._failure = node, checksums, figures, failure
        self._channel, self.welcome, self._out = channel, welcome, out
        self._planes: dict[str, Plane] = {}
        self._rates: dict[str, float] = {}
        self._held: dict[int, asyncio.Queue[pb.BlocksHeld]] = {}
        self._numbers = itertools.count(1)
        self._sockets: dict[int, asyncio.Future[pb.SocketOpened]] = {}
        # The last ones that were opened, also before they are among the planes.
        self._nixl: NixlPlane | None = None
        self._peer: PeerPlane | None = None
        self._repair: asyncio.Task[None] | None = None
        self._repair_later: asyncio.TimerHandle | None = None
        self._repair_s = REPAIR_S
        self._broken = False

    # ------------------------------------------------------------------ what the peer tells

    def ask(self, pull_id: int, request: pb.ConnectRequest) -> None:
        """What the peer tells of this pull in answer comes by `told`, until `forget`."""
        self._held[pull_id] = asyncio.Queue()
        self._out.put_nowait(request)

    async def told(self, pull_id: int, seconds: float, since: asyncio.Event | None = None) -> pb.BlocksHeld:
        """What the peer tells next of this pull, within `seconds` (of the event, if one is given), else PeerError."""
        self._check()
        waiting = asyncio.ensure_future(self._held[pull_id].get())
        happened = asyncio.ensure_future(since.wait()) if since is not None else None
        try:
            if happened is not None:
                await asyncio.wait([waiting, happened], return_when=asyncio.FIRST_COMPLETED)
            # Not wait_for: before Python 3.12 it takes a cancellation that comes with the answer for none, and the pull
            # of a request that was given up would wait for a prefill that was given up, too.
            async with asyncio.timeout(seconds):
                held = await waiting
        except TimeoutError:
            raise PeerError(f"{self._figures.address} told nothing more within {seconds:g} s") from None
        finally:
            waiting.cancel()
            if happened is not None:
                happened.cancel()
        self._check()
        return held

    def forget(self, pull_id: int) -> None:
        """The pull needs nothing of the peer any more."""
        if self._held.pop(pull_id, None) is not None:
            self._out.put_nowait(pb.ConnectRequest(release=pb.ReleasePin(pull_id=pull_id)))

    def _check(self) -> None:
        if self._broken:
            raise PeerError(f"the connection to {self._figures.address} broke")

    async def listen(self, call: grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]) -> None:
        """Hand on what comes until the stream ends."""
        while isinstance(response := await call.read(), pb.ConnectResponse):
            if response.HasField("held"):
                if queue := self._held.get(response.held.pull_id):
                    queue.put_nowait(response.held)
            elif response.HasField("nixl_opened") or response.HasField("nixl_moved"):
                if self._nixl is not None:
                    self._nixl.heard(response)
            elif response.HasField("peer_opened") or response.HasField("checked"):
                if self._peer is not None:
                    self._peer.heard(response)
            elif (opened := self._sockets.pop(response.socket.request_id, None)) and not opened.done():
                opened.set_result(response.socket)

    def close(self) -> None:
        """It broke, or is not needed: whoever waits for something of it is told so."""
        self._broken = True
        if self._repair is not None:
            self._repair.cancel()
        if self._repair_later is not None:
            self._repair_later.cancel()
        for plane in self._planes.values():
            plane.close()
        for opened_last in (self._nixl, self._peer):
            if opened_last is not None:
                opened_last.close()
        for queue in self._held.values():
            queue.put_nowait(pb.BlocksHeld())
        for opened in self._sockets.values():
            if not opened.done():
                opened.set_exception(PlaneError("the connection broke"))
                # Whoever waited for it may be gone.
                opened.exception()

    # ------------------------------------------------------------------ which plane

    async def plane(self) -> Plane:
        """The one to use now. Raises PeerError when none works."""
        return self._best or await self._repaired()

    def broke(self, plane: Plane) -> None:
        """Use others until it has been repaired."""
        if self._planes.get(plane.name) is plane:
            del self._planes[plane.name]
            plane.close()
            self._figures.fallbacks += 1
            log.warning("peer=%s plane=%s event=plane_broke", self._figures.address, plane.name)
            self._chose()
            self._repair_s = REPAIR_S
            self._plan_repair()

    async def open_planes(self) -> None:
        """Open and probe every plane that is not there. Raises PeerError when none works."""
        wanted = self._node.config.planes
        for name in wanted:
            if name not in self._planes:
                await self._open_probed(name)
        self._planes = {name: self._planes[name] for name in wanted if name in self._planes}
        if len(self._planes) < len(wanted):
            self._plan_repair()
            self._repair_s = min(2 * self._repair_s, MOST_REPAIR_S)
        else:
            self._repair_s = REPAIR_S
        if self._best is None:
            raise self._failure.record(f"no plane works to {self._figures.address}; tried {', '.join(wanted)}")
        self._chose()

    @property
    def _best(self) -> Plane | None:
        """The first plane that works, unless a later one was much faster when probed: probes are noisy."""
        best: Plane | None = None
        for name, plane in self._planes.items():
            if best is None or self._rates[name] > CLEARLY * self._rates[best.name]:
                best = plane
        return best

    def _chose(self) -> None:
        plane = self._best
        self._figures.plane = plane.name if plane else ""
        self._figures.probe_bytes_per_s = self._rates[plane.name] if plane else 0.0
        if plane is not None:
            log.info(
                "peer=%s node=%s event=plane plane=%s gb_per_s=%.2f of=%s",
                self._figures.address, self.welcome.node_id, plane.name, self._rates[plane.name] / 1e9,
                ",".join(self._planes),
            )  # fmt: skip

    def _plan_repair(self) -> None:
        if self._repair_later is not None:
            self._repair_later.cancel()
        self._repair_later = asyncio.get_running_loop().call_later(self._repair_s, self._start_repair)

    def _start_repair(self) -> asyncio.Task[None]:
        """Open again what broke, in a task of its own: pulls that wait for it may be given up."""
        if self._repair_later is not None:
            self._repair_later.cancel()
            self._repair_later = None
        if self._repair is None or self._repair.done():
            self._repair = asyncio.create_task(self.open_planes())
            self._repair.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._repair

    async def _repaired(self) -> Plane:
        self._failure.check()
        repair = self._start_repair()
        await asyncio.wait([repair])
        if repair.cancelled() or self._best is None:
            raise PeerError(f"no plane works to {self._figures.address}")
        return self._best

    # ------------------------------------------------------------------ opening one

    async def _open_probed(self, name: str) -> None:
        plane: Plane | None = None
        try:
            plane = await self._open(name)
            self._rates[name] = await probe(plane, self._node.memory)
        except BaseException as error:
            if plane is not None:
                plane.close()
            if not isinstance(error, PlaneError):
                raise
            log.warning("peer=%s plane=%s event=plane_failed reason=%s", self._figures.address, name, error)
        else:
            self._planes[name] = plane

    async def _open(self, name: str) -> Plane:
        node, timeout_s = self._node, self._node.config.transfer_timeout_s
        if name == "grpc":
            by_grpc = GrpcPlane(node.memory, self._checksums, timeout_s)
            by_grpc.open(self._channel, self.welcome.secret)
            return by_grpc
        if name == "nixl":
            assert isinstance(node.memory, SlabMemory | DeviceMemory)
            self._nixl = NixlPlane(node.memory, self._checksums, timeout_s, self._out.put_nowait)
            await self._nixl.open(node.config.node_id)
            return self._nixl
        if name == "peer":
            if not isinstance(node.memory, DeviceMemory):
                raise PlaneError("the plane peer is for slabs on devices")
            self._peer = PeerPlane(node.memory, self._checksums, timeout_s, self._out.put_nowait)
            await self._peer.open()
            return self._peer
        by_socket = SocketPlane(node.memory, self._checksums, timeout_s)
        host = self._figures.address.rpartition(":")[0]
        await by_socket.open(host, self._ask_for_a_socket, node.config.connections)
        return by_socket

    async def _ask_for_a_socket(self) -> tuple[int, bytes]:
        """The port to connect to, and the secret that this connection must show."""
        number = next(self._numbers)
        opened = self._sockets[number] = asyncio.get_running_loop().create_future()
        self._out.put_nowait(pb.ConnectRequest(open_socket=pb.OpenSocket(request_id=number)))
        try:
            async with asyncio.timeout(CONNECT_S):
                answer = await opened
        except TimeoutError:
            raise PlaneError("the peer gave no secret in time") from None
        return answer.port, answer.secret
