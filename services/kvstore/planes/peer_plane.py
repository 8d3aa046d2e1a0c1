"""The reading side of the peer plane: the device of this store copies out of the slab of another one on the same host.

The reader copies by itself, from memory that the source may give out anew meanwhile. So the source is asked afterwards
whether the slots still were what they had been, and only then is a block good. `read` returns, also when cancelled,
only when its copies are over: they are the only thing that writes to the slots. It knows no urgency.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from headway.slab.device import DeviceError, DeviceMapping
from headway.slab.host import SlabError
from headway.v1 import transfer_pb2 as pb
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT
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
from services.kvstore.planes.peer_source import boot_id

log = logging.getLogger(__name__)


class _Way:
    """The mapped slab of the source, and a stream; used by one thread. Raises DeviceError and SlabError."""

    def __init__(self, memory: DeviceMemory, opened: pb.PeerOpened) -> None:
        self._memory = memory
        device = memory.segment.device
        with contextlib.ExitStack() as stack:
            self._slab = DeviceMapping(device, opened.handle, opened.bytes)
            stack.callback(self._slab.close)
            self._probe = DeviceMapping(device, opened.probe_handle, opened.probe_bytes)
            stack.callback(self._probe.close)
            self._stream = device.module.stream(device.index)
            self._stack = stack.pop_all()

    def copy(self, moves: Sequence[Move]) -> None:
        """Until all bytes are there."""
        size = self._memory.slot_bytes
        for move in moves:
            self._stream.copy(self._memory.address(move.slot), self._source(move.source), size)
        self._stream.wait()
        if any(move.slot == LANDING_SLOT for move in moves):
            self._memory.look_at_landing()

    def _source(self, slot: int) -> int:
        if slot == PROBE_SLOT:
            return self._probe.address
        start = slot * self._memory.stride
        if start + self._memory.stride > self._slab.size:
            raise DeviceError(f"the source has no slot {slot}")
        return self._slab.address + start

    def close(self) -> None:
        self._stack.close()


class PeerPlane:
    """Reads from one peer, a request of REQUEST_BYTES at a time."""

    name = "peer"

    def __init__(
        self,
        memory: DeviceMemory,
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
        self._opened: asyncio.Future[pb.PeerOpened] = self._loop.create_future()
        self._checks: dict[int, asyncio.Future[pb.BlocksChecked]] = {}
        self._thread = ThreadPoolExecutor(1, "transfer-in")
        self._way: _Way | None = None
        self._closed = False

    async def open(self) -> None:
        """Raises PlaneError; then the plane is closed."""
        try:
            self._send(pb.ConnectRequest(open_peer=pb.OpenPeer()))
            async with asyncio.timeout(self._timeout_s):
                opened = await self._opened
            self._check_place(opened)
            if not self._closed:
                await self._loop.run_in_executor(self._thread, self._find_way, opened)
            if self._closed:
                raise PlaneError("the plane was closed")
        except TimeoutError:
            self.close()
            raise PlaneError("the peer did not lead to its slab in time") from None
        except SlabError as error:
            self.close()
            raise PlaneError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def _check_place(self, opened: pb.PeerOpened) -> None:
        device = self._memory.segment.device
        module = device.module
        if opened.error:
            raise PlaneError(f"the peer: {opened.error}")
        if opened.host != boot_id():
            raise PlaneError("the peer is on another host")
        if opened.kind != module.kind:
            raise PlaneError(f"the peer's slab is on a {opened.kind} device, this one on {device}")
        peers = [at for at in range(module.count()) if module.bus_id(at) == opened.bus_id]
        if not peers or not module.reaches(device.index, peers[0]):
            raise PlaneError(f"{device} does not reach the peer's device {opened.bus_id} directly")

    def heard(self, response: pb.ConnectResponse) -> None:
        """One of the messages of this plane."""
        if response.HasField("peer_opened"):
            if not self._opened.done():
                self._opened.set_result(response.peer_opened)
        elif (check := self._checks.pop(response.checked.request_id, None)) and not check.done():
            check.set_result(response.checked)

    async def read(self, moves: Sequence[Move], urgency: Urgency) -> list[Copied]:
        copied: list[Copied] = []
        for at in range(0, len(moves), self._batch):
            if self._closed or self._way is None:
                break
            copied += await self._read(self._way, moves[at : at + self._batch])
        return copied + [Copied.MISSING] * (len(moves) - len(copied))

    async def _read(self, way: _Way, moves: Sequence[Move]) -> list[Copied]:
        """At most one request; shorter than `moves` when the plane broke."""
        copying = self._loop.run_in_executor(self._thread, way.copy, moves)
        try:
            await asyncio.shield(copying)
            checked, sums = await self._check(moves)
        except asyncio.CancelledError:
            await all_over([copying])
            raise
        except (DeviceError, TimeoutError, PlaneError) as error:
            log.warning("event=transfer_failed plane=peer reason=%s", str(error) or "no answer in time")
            self.close()
            return []
        theirs = checked.checksums or [None] * len(moves)
        return [
            judge(found, current=current, checksum=checksum)
            for found, current, checksum in zip(sums, checked.current, theirs, strict=True)
        ]

    async def _check(self, moves: Sequence[Move]) -> tuple[pb.BlocksChecked, Sequence[int | None]]:
        """What the source says of these slots now, and what came. Raises PlaneError, TimeoutError."""
        if self._closed:
            raise PlaneError("the plane was closed")
        checksum, number = self._checksums.wanted(), next(self._numbers)
        waiting = self._checks[number] = self._loop.create_future()
        check = pb.CheckBlocks(
            request_id=number,
            slots=[move.source for move in moves],
            generations=[move.generation for move in moves],
            checksum=checksum,
        )
        self._send(pb.ConnectRequest(check=check))
        sums: Sequence[int | None] = [None] * len(moves)
        try:
            if checksum:
                targets = [move.slot for move in moves]
                sums = await self._loop.run_in_executor(None, self._memory.checksums, targets)
            async with asyncio.timeout(self._timeout_s):
                checked = await waiting
        finally:
            self._checks.pop(number, None)
        if len(checked.current) != len(moves) or (checksum and len(checked.checksums) != len(moves)):
            raise PlaneError("the answer does not fit")
        return checked, sums

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        log.info("event=plane_closed plane=peer")
        if not self._opened.done():
            self._opened.set_exception(PlaneError("the plane was closed"))
            self._opened.exception()
        checks, self._checks = self._checks, {}
        for check in checks.values():
            if not check.done():
                check.set_exception(PlaneError("the plane was closed"))
                check.exception()
        # After the copies that are on their way.
        self._thread.submit(self._let_go)
        self._thread.shutdown(wait=False)

    # ------------------------------------------------------------------ in the thread

    def _find_way(self, opened: pb.PeerOpened) -> None:
        # Here and not on the event loop: `_let_go`, which comes next if the plane is closed meanwhile, must find it.
        self._way = _Way(self._memory, opened)

    def _let_go(self) -> None:
        if self._way is not None:
            with contextlib.suppress(DeviceError):
                self._way.close()
