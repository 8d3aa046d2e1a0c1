"""The reading side of the NIXL plane: an agent of its own for each peer, whose slab the peer's agent writes to.

The peer writes (mode "write", twice as fast over TCP) or this side reads (mode "read"). Requests go over the Connect
stream, most urgent first, AHEAD of them at a time.

When may a slot be given out again? The peer's NIC, or bytes in a socket, could write to it long after the peer is gone.
So `read` returns a block, or returns after it was cancelled, only when one of these is true:

- The peer never heard of the block.
- The peer has answered that the block's transfer is DONE (and in mode "read" the own agent says so, too). The answer
  to a transfer that failed does not count.
- The own agent, the only one through which this peer can reach the slab, has been destroyed: its endpoints are closed
  and its memory registrations void. Taking back the registration alone does not do: over TCP, bytes still arrive.

The peer's part in this is only to be quick: whatever it does or fails to do, the last point ends the wait. A plane
breaks, which destroys its agent, when an answer takes longer than the timeout, when a transfer fails, and when the
Connect stream ends; the blocks on their way are MISSING then. Should the native agent ever survive its destruction,
those reads never return and their slots stay leased.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from headway.v1 import transfer_pb2 as pb
from services.kvstore.memory import SlabMemory
from services.kvstore.planes.contract import Checksums, Copied, Move, PlaneError, Urgency, request_blocks, verdict
from services.kvstore.planes.nixl_agent import DONE, MOVING, READ, Agent, AgentThread, Remote

log = logging.getLogger(__name__)

# Requests on the way, so that the peer never waits for the next.
AHEAD = 2
# For both agents to register their slabs: RDMA pins each page.
OPEN_S = 10.0


@dataclass(slots=True)
class _Job:
    """A request's worth of moves; `done` is told on the event loop."""

    moves: Sequence[Move]
    done: asyncio.Future[list[Copied]]
    checksum: bool
    moved: pb.NixlMoved | None = None
    # Of a transfer that was begun here.
    landed: bool = True


class NixlPlane:
    """Reads from one peer. In flight are at most AHEAD requests of REQUEST_BYTES."""

    name = "nixl"

    def __init__(
        self,
        memory: SlabMemory,
        checksums: Checksums,
        timeout_s: float,
        send: Callable[[pb.ConnectRequest], None],
        *,
        write: bool = True,
    ) -> None:
        self._memory = memory
        self._checksums = checksums
        self._timeout_s = timeout_s
        self._send = send
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._batch = request_blocks(memory.slot_bytes)
        self._numbers = itertools.count(1)
        self._waiting: list[tuple[Urgency, int, _Job]] = []
        self._on_the_way: dict[int, _Job] = {}
        self._heard_s = time.monotonic()
        self._closed = False
        self._thread: AgentThread | None = None
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._watchdog = self._loop.call_later(timeout_s, self._watch)
        # Of the agent's thread: the peer, and transfers begun here by request_id.
        self._remote: Remote | None = None
        self._reading: dict[int, int] = {}

    async def open(self, name: str) -> None:
        """`name` is this node's. Raises PlaneError; then the plane is closed."""
        self._thread = AgentThread(name, self._memory, self._turn, lambda reason: self._on_loop(self._over, reason))
        self._thread.submit(lambda agent: self._on_loop(self._introduce, agent.card))
        try:
            async with asyncio.timeout(OPEN_S):
                await self._opened
        except TimeoutError:
            self._break("the peer's agent did not answer in time")
            raise PlaneError("the peer's agent did not answer in time") from None
        except BaseException:
            self._break("it could not be opened")
            raise

    def _introduce(self, card: pb.NixlCard) -> None:
        self._send(pb.ConnectRequest(open_nixl=pb.OpenNixl(card=card, write=self._write)))

    def heard(self, response: pb.ConnectResponse) -> None:
        """One of the messages of this plane."""
        if response.HasField("nixl_moved"):
            self._moved(response.nixl_moved)
        elif response.nixl_opened.error:
            self._break(f"the peer's agent: {response.nixl_opened.error}")
        elif self._thread is not None and not self._closed:
            card = response.nixl_opened.card
            self._thread.submit(lambda agent: self._meet(agent, card))

    # ------------------------------------------------------------------ reading

    async def read(self, moves: Sequence[Move], urgency: Urgency) -> list[Copied]:
        if self._closed:
            return [Copied.MISSING] * len(moves)
        jobs = [
            _Job(moves[at : at + self._batch], self._loop.create_future(), self._checksums.wanted())
            for at in range(0, len(moves), self._batch)
        ]
        for job in jobs:
            heapq.heappush(self._waiting, (urgency, next(self._numbers), job))
        self._ask()
        try:
            results = await asyncio.gather(*(asyncio.shield(job.done) for job in jobs))
        except asyncio.CancelledError:
            self._drop(jobs)
            # See above; the timeout bounds this. Another cancel does not cut it short.
            while on_the_way := [job.done for job in jobs if not job.done.done()]:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait(on_the_way)
            raise
        return [copied for result in results for copied in result]

    def _ask(self) -> None:
        """For as much as may be on the way."""
        while self._waiting and len(self._on_the_way) < AHEAD and not self._closed:
            _, number, job = heapq.heappop(self._waiting)
            if not self._on_the_way:
                self._heard_s = time.monotonic()
            self._on_the_way[number] = job
            job.landed = self._write
            move = pb.MoveNixl(
                request_id=number,
                slots=[move.source for move in job.moves],
                generations=[move.generation for move in job.moves],
                targets=[move.slot for move in job.moves],
                checksum=job.checksum,
            )
            self._send(pb.ConnectRequest(move_nixl=move))
            assert self._thread is not None
            self._thread.submit(partial(self._begin, number, job))

    def _moved(self, moved: pb.NixlMoved) -> None:
        job = self._on_the_way.get(moved.request_id)
        if job is None or job.moved is not None:
            return
        self._heard_s = time.monotonic()
        if moved.error or len(moved.current) != len(job.moves):
            self._break(f"a transfer failed: {moved.error or 'the answer does not fit'}")
            return
        job.moved = moved
        self._settle(moved.request_id, job)

    def _landed(self, number: int) -> None:
        if job := self._on_the_way.get(number):
            job.landed = True
            self._settle(number, job)

    def _settle(self, number: int, job: _Job) -> None:
        """Once both sides are done with the bytes, judge them."""
        if job.moved is None or not job.landed or self._closed:
            return
        if job.checksum:
            assert self._thread is not None
            self._thread.submit(lambda agent: self._on_loop(self._tell, number, self._verdicts(job)))
        else:
            self._tell(number, self._verdicts(job))

    def _verdicts(self, job: _Job) -> list[Copied]:
        assert job.moved is not None
        sums: Sequence[int | None] = job.moved.checksums if job.checksum else [None] * len(job.moves)
        if len(sums) != len(job.moves):
            return [Copied.CORRUPT] * len(job.moves)
        return [
            verdict(self._memory.view(move.slot), current=current, checksum=checksum)
            for move, current, checksum in zip(job.moves, job.moved.current, sums, strict=True)
        ]

    def _tell(self, number: int, result: list[Copied]) -> None:
        if job := self._on_the_way.pop(number, None):
            job.done.set_result(result)
            self._ask()

    def _drop(self, jobs: list[_Job]) -> None:
        """Jobs that the peer has not heard of are over."""
        dropped = set(map(id, jobs))
        over = [item[2] for item in self._waiting if id(item[2]) in dropped]
        self._waiting = [item for item in self._waiting if id(item[2]) not in dropped]
        heapq.heapify(self._waiting)
        for job in over:
            job.done.set_result([])

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        self._break("the plane was closed")

    def _watch(self) -> None:
        """Break with a peer that is silent for too long while something is on its way."""
        if self._on_the_way and self._heard_s < time.monotonic() - self._timeout_s:
            self._break(f"nothing came for {self._timeout_s:g} s")
        else:
            self._watchdog = self._loop.call_later(self._timeout_s / 4, self._watch)

    def _break(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        log.info("event=plane_closed plane=nixl reason=%s", reason)
        self._watchdog.cancel()
        if not self._opened.done():
            self._opened.set_exception(PlaneError(reason))
            # Nobody may wait for it.
            self._opened.exception()
        self._send(pb.ConnectRequest(close_nixl=pb.CloseNixl()))
        waiting, self._waiting = self._waiting, []
        for _, _, job in waiting:
            job.done.set_result([Copied.MISSING] * len(job.moves))
        if self._thread is not None:
            self._thread.close()

    def _over(self, reason: str) -> None:
        """The agent is no more: nothing writes to the slots of what was on its way."""
        self._break(reason)
        for job in self._on_the_way.values():
            job.done.set_result([Copied.MISSING] * len(job.moves))
        self._on_the_way.clear()

    # ------------------------------------------------------------------ in the agent's thread

    def _meet(self, agent: Agent, card: pb.NixlCard) -> None:
        if not self._write:
            self._remote = agent.meet(card)
        self._on_loop(self._ready)

    def _ready(self) -> None:
        if not self._opened.done():
            self._opened.set_result(None)

    def _begin(self, number: int, job: _Job, agent: Agent) -> None:
        if self._write:
            return
        assert self._remote is not None
        mine, theirs = [move.slot for move in job.moves], [move.source for move in job.moves]
        self._reading[number] = agent.begin(READ, mine, self._remote, theirs, str(number).encode())

    def _turn(self, agent: Agent) -> bool:
        """Let the peer's transfers go on, see to the own ones; whether anything is on its way."""
        if not self._on_the_way:
            return False
        if self._write:
            agent.progress()
        for number, transfer in list(self._reading.items()):
            state = agent.state(transfer)
            if state == MOVING:
                continue
            if state != DONE:
                raise RuntimeError("a transfer failed")
            agent.end(transfer)
            del self._reading[number]
            self._on_loop(self._landed, number)
        return True

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)
