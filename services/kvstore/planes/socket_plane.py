"""The reading side of the socket plane: a few connections to one peer, a thread each, straight into the slab."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from services.kvstore.memory import Memory
from services.kvstore.planes.contract import (
    Checksums,
    Copied,
    Move,
    PlaneError,
    Urgency,
    all_over,
    digests,
    judge,
    request_blocks,
)
from services.kvstore.planes.frames import (
    MOST_BLOCKS,
    VERDICT,
    WELCOME,
    FrameError,
    hang_up,
    pack_request,
    receive_all,
    set_timeouts,
)

log = logging.getLogger(__name__)

# Requests on the way on one connection, so that the source never waits for the next.
AHEAD = 2
CONNECT_S = 2.0


@dataclass(slots=True)
class _Job:
    """A request's worth of moves; `done` is told on the event loop."""

    moves: Sequence[Move]
    done: asyncio.Future[list[Copied]]
    checksum: bool = False


@dataclass(slots=True)
class _Queue:
    """Jobs that no connection has taken yet, most urgent first."""

    jobs: list[tuple[Urgency, int, _Job]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False


class SocketPlane:
    """Reads from one peer. In flight are at most connections × AHEAD requests of REQUEST_BYTES."""

    name = "socket"

    def __init__(self, memory: Memory, checksums: Checksums, timeout_s: float) -> None:
        self._memory = memory
        self._checksums = checksums
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._queue = _Queue()
        self._numbers = itertools.count()
        # Each with the time since when it waits for one request's answer, None while there is none.
        self._connections: dict[socket.socket, float | None] = {}
        self._watchdog = self._loop.call_later(timeout_s, self._watch)
        self._batch = min(MOST_BLOCKS, request_blocks(memory.slot_bytes))

    async def open(self, host: str, ask: Callable[[], Awaitable[tuple[int, bytes]]], connections: int) -> None:
        """`ask` gets a port and a one-time secret from the peer. Raises PlaneError; then the plane is closed."""
        try:
            await self._open(host, ask, connections)
        except BaseException:
            self.close()
            raise

    async def _open(self, host: str, ask: Callable[[], Awaitable[tuple[int, bytes]]], connections: int) -> None:
        for _ in range(connections):
            port, secret = await ask()
            if not port:
                raise PlaneError("the peer serves no sockets")
            try:
                await asyncio.to_thread(self._connect, host, port, secret)
            except (OSError, FrameError) as error:
                raise PlaneError(f"no data connection to {host}:{port}: {error}") from None

    def _connect(self, host: str, port: int, secret: bytes) -> None:
        connection = socket.create_connection((host, port), CONNECT_S)
        try:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            set_timeouts(connection, receive_s=CONNECT_S, send_s=self._timeout_s)
            connection.sendall(secret)
            if connection.recv(1) != WELCOME:
                raise FrameError("the peer did not accept the secret")
            # From now on the watchdog sees to it: the kernel's timeout starts anew with every byte that trickles in.
            set_timeouts(connection, receive_s=0, send_s=self._timeout_s)
            with self._queue.changed:
                if self._queue.closed:
                    raise FrameError("the plane was closed meanwhile")
                self._connections[connection] = None
            threading.Thread(target=self._run, args=(connection,), name="transfer-in", daemon=True).start()
        except BaseException:
            connection.close()
            raise

    def _watch(self) -> None:
        """Hang up on a peer that takes too long over one request."""
        late_s = time.monotonic() - self._timeout_s
        for connection, since_s in list(self._connections.items()):
            if since_s is not None and since_s < late_s:
                log.warning("event=transfer_stalled plane=socket seconds=%g", self._timeout_s)
                hang_up(connection)
        self._watchdog = self._loop.call_later(self._timeout_s / 4, self._watch)

    async def read(self, moves: Sequence[Move], urgency: Urgency) -> list[Copied]:
        jobs = [
            _Job(moves[at : at + self._batch], self._loop.create_future(), checksum=self._checksums.wanted())
            for at in range(0, len(moves), self._batch)
        ]
        with self._queue.changed:
            if self._queue.closed:
                return [Copied.MISSING] * len(moves)
            for job in jobs:
                heapq.heappush(self._queue.jobs, (urgency, next(self._numbers), job))
            self._queue.changed.notify_all()
        try:
            results = await asyncio.gather(*(asyncio.shield(job.done) for job in jobs))
        except asyncio.CancelledError:
            self._drop(jobs)
            # What is on its way still writes; each connection's timeout bounds this.
            await all_over([job.done for job in jobs])
            raise
        return [copied for result in results for copied in result]

    def _drop(self, jobs: list[_Job]) -> None:
        """Jobs that no connection has taken are over."""
        dropped = set(map(id, jobs))
        with self._queue.changed:
            waiting = self._queue.jobs
            self._queue.jobs = [item for item in waiting if id(item[2]) not in dropped]
            heapq.heapify(self._queue.jobs)
        for _, _, job in waiting:
            if id(job) in dropped:
                job.done.set_result([])

    def close(self) -> None:
        self._watchdog.cancel()
        self._close("the plane was closed")

    def _close(self, reason: str) -> None:
        with self._queue.changed:
            if not self._queue.closed:
                log.info("event=plane_closed plane=socket reason=%s", reason)
            self._queue.closed = True
            left, self._queue.jobs = self._queue.jobs, []
            self._queue.changed.notify_all()
        for _, _, job in left:
            self._tell(job, [Copied.MISSING] * len(job.moves))
        for connection in list(self._connections):
            hang_up(connection)

    # ------------------------------------------------------------------ in a connection's thread

    def _run(self, connection: socket.socket) -> None:
        """Keep requests on the way as long as there are any, and take what comes."""
        on_the_way: deque[_Job] = deque()
        try:
            with connection:
                while True:
                    while len(on_the_way) < AHEAD and (job := self._next(wait=not on_the_way)) is not None:
                        on_the_way.append(job)
                        slots = [(move.source, move.generation) for move in job.moves]
                        connection.sendall(pack_request(slots, checksum=job.checksum))
                    if not on_the_way:
                        return
                    self._connections[connection] = time.monotonic()
                    result = self._receive(connection, on_the_way[0])
                    self._connections[connection] = None
                    self._tell(on_the_way.popleft(), result)
        except Exception as error:  # also the device's that the bytes go to: no job may wait for a thread that is gone
            self._fail(on_the_way, f"the data connection broke: {error}")

    def _next(self, *, wait: bool) -> _Job | None:
        """The most urgent job; None when the plane was closed or, without `wait`, when there is none."""
        queue = self._queue
        with queue.changed:
            while not queue.closed:
                if queue.jobs:
                    return heapq.heappop(queue.jobs)[2]
                if not wait:
                    return None
                queue.changed.wait()
        return None

    def _receive(self, connection: socket.socket, job: _Job) -> list[Copied]:
        verdicts = bytearray(VERDICT.size * len(job.moves))
        sums: list[int | None] = []
        with contextlib.closing(self._memory.incoming([move.slot for move in job.moves])) as pieces:
            for views in pieces:
                receive_all(connection, views)
                sums += digests(views) if job.checksum else [None] * len(views)
        receive_all(connection, [memoryview(verdicts)])
        return [
            judge(found, current=current == 1, checksum=checksum)
            for found, (current, checksum) in zip(sums, VERDICT.iter_unpack(verdicts), strict=True)
        ]

    def _fail(self, on_the_way: deque[_Job], reason: str) -> None:
        for job in on_the_way:
            self._tell(job, [Copied.MISSING] * len(job.moves))
        self._close(reason)

    def _tell(self, job: _Job, result: list[Copied]) -> None:
        def tell() -> None:
            if not job.done.done():
                job.done.set_result(result)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell)
