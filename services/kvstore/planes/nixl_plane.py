"""The reading side of the NIXL plane: an agent of its own for each peer, whose slab the peer's agent writes to.

The peer writes. (Reading is half as fast over TCP, and there a reader that dies in the middle takes the peer's process
with it: UCX 1.20 aborts on the answer that it cannot give.) Requests go over the Connect stream, most urgent first,
AHEAD of them at a time.

When may a slot be given out again? The peer's NIC, or bytes in a socket, could write to it long after the peer is gone.
So `read` returns a block, or returns after it was cancelled, only when one of these is true:

- The peer never heard of the block.
- The peer has answered that the block's transfer is DONE. The answer to a transfer that failed does not count.
- The own agent, the only one through which this peer can reach the slab, has been destroyed: its endpoints are closed
  and its memory registrations void. Taking back the registration alone does not do: over TCP, bytes still arrive. Nor
  does any of this end UCX's shortcuts on one host (CMA needs no more than a pid and an address): they are forbidden.

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

from headway.v1 import transfer_pb2 as pb
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import LANDING_SLOT, SlabMemory
from services.kvstore.planes.contract import (
    Checksums,
    Copied,
    Move,
    PlaneError,
    Urgency,
    all_over,
    judge,
    request_blocks,
)
from services.kvstore.planes.nixl_agent import Agent, AgentThread, nothing

log = logging.getLogger(__name__)

# Requests on the way, so that the peer never waits for the next.
AHEAD = 2


@dataclass(slots=True)
class _Job:
    """A request's worth of moves; `done` is told on the event loop."""

    moves: Sequence[Move]
    done: asyncio.Future[list[Copied]]
    checksum: bool
    answered: bool = False


class NixlPlane:
    """Reads from one peer. In flight are at most AHEAD requests of REQUEST_BYTES."""

    name = "nixl"

    def __init__(
        self,
        memory: SlabMemory | DeviceMemory,
        checksums: Checksums,
        timeout_s: float,
        send: Callable[[pb.ConnectRequest], None],
    ) -> None:
        self._memory = memory
        self._checksums = checksums
        self._timeout_s = timeout_s
        self._send = send
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

    async def open(self, name: str) -> None:
        """`name` is this node's. Raises PlaneError; then the plane is closed."""
        self._thread = AgentThread(name, self._memory, self._turn, lambda reason: self._on_loop(self._over, reason))
        self._thread.submit(lambda agent: self._on_loop(self._introduce, agent.card))
        try:
            # Both agents register their slabs meanwhile; RDMA pins each page.
            async with asyncio.timeout(self._timeout_s):
                await self._opened
        except TimeoutError:
            self._break("the peer's agent did not answer in time")
            raise PlaneError("the peer's agent did not answer in time") from None
        except BaseException:
            self._break("it could not be opened")
            raise

    def _introduce(self, card: pb.NixlCard) -> None:
        self._send(pb.ConnectRequest(open_nixl=pb.OpenNixl(card=card)))

    def heard(self, response: pb.ConnectResponse) -> None:
        """One of the messages of this plane."""
        if response.HasField("nixl_moved"):
            self._moved(response.nixl_moved)
        elif response.nixl_opened.error:
            self._break(f"the peer's agent: {response.nixl_opened.error}")
        elif not self._opened.done():
            self._opened.set_result(None)

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
            # See above; the timeout bounds this.
            await all_over([job.done for job in jobs])
            raise
        return [copied for result in results for copied in result]

    def _ask(self) -> None:
        """For as much as may be on the way."""
        while self._waiting and len(self._on_the_way) < AHEAD and not self._closed:
            _, number, job = heapq.heappop(self._waiting)
            if not self._on_the_way:
                self._heard_s = time.monotonic()
            self._on_the_way[number] = job
            move = pb.MoveNixl(
                request_id=number,
                slots=[move.source for move in job.moves],
                generations=[move.generation for move in job.moves],
                targets=[move.slot for move in job.moves],
                checksum=job.checksum,
            )
            self._send(pb.ConnectRequest(move_nixl=move))
            assert self._thread is not None
            self._thread.submit(nothing)

    def _moved(self, moved: pb.NixlMoved) -> None:
        job = self._on_the_way.get(moved.request_id)
        if job is None or job.answered:
            return
        self._heard_s = time.monotonic()
        if moved.error or len(moved.current) != len(job.moves):
            self._break(f"a transfer failed: {moved.error or 'the answer does not fit'}")
            return
        number, job.answered = moved.request_id, True
        if self._closed:
            return
        if job.checksum or any(move.slot == LANDING_SLOT for move in job.moves):
            assert self._thread is not None
            self._thread.submit(lambda agent: self._on_loop(self._tell, number, self._verdicts(job, moved)))
        else:
            self._tell(number, self._verdicts(job, moved))

    def _verdicts(self, job: _Job, moved: pb.NixlMoved) -> list[Copied]:
        sums: Sequence[int | None] = moved.checksums if job.checksum else [None] * len(job.moves)
        if len(sums) != len(job.moves):
            return [Copied.CORRUPT] * len(job.moves)
        slots = [move.slot for move in job.moves]
        if isinstance(self._memory, DeviceMemory) and LANDING_SLOT in slots:
            self._memory.look_at_landing()
        found = self._memory.checksums(slots) if job.checksum else [None] * len(slots)
        return [
            judge(ours, current=current, checksum=checksum)
            for ours, current, checksum in zip(found, moved.current, sums, strict=True)
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

    def _turn(self, agent: Agent) -> bool:
        """Let the peer's transfers go on; whether any is on its way."""
        if not self._on_the_way:
            return False
        agent.progress()
        return True

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)
