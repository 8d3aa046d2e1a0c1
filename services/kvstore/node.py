"""The node's state: slab, accounting, and the sessions of its workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

import grpc

from headway.core.audit import check_integrity
from headway.core.instructions import Filled, Instruction, Offer, Reclaim, StartPull, StopPull
from headway.core.leases import PULL
from headway.core.model import KvFormat
from headway.core.records import ForgetfulRecords
from headway.core.store import Store
from headway.runtime.errors import HeadwayError
from headway.slab.host import slot_stride
from headway.v1 import kvstore_pb2 as pb
from services.kvstore.config import KvStoreConfig
from services.kvstore.convert import reply_of
from services.kvstore.device_keeper import DeviceKeeper
from services.kvstore.memory import Memory
from services.kvstore.restart import FormerWorker, Keeper, started_at
from services.kvstore.session import Session

if TYPE_CHECKING:
    from services.kvstore.pulls import Pulls
    from services.kvstore.readers import Reader
    from services.kvstore.tiering import Tiering

log = logging.getLogger(__name__)

TICK_S = 0.05
# Walking a larger slab would hold up the loop for more than a few milliseconds.
AUDIT_SLOTS = 16384


class Node:
    """After each change of the store, `settle` sends what other sessions must hear and wakes the watchers."""

    def __init__(self, config: KvStoreConfig, keeper: Keeper | DeviceKeeper, memory: Memory) -> None:
        self.config = config
        self.segment = keeper.segment
        self.memory = memory
        self._keeper = keeper
        self.epoch = time.time_ns()
        self.kv_format: KvFormat | None = None
        self.store = Store(ForgetfulRecords(0), 1, config.handoff_hold_s)
        self.sessions: dict[str, Session] = {}
        # Other nodes' stores that read here, and what is fetched from them.
        self.readers: dict[str, Reader] = {}
        self.pulls: Pulls | None = None
        self.tiering: Tiering | None = None
        self.corrupt_blocks = 0
        self.stale_blocks = 0
        self.watchers: set[asyncio.Event] = set()
        self._announced = 0
        self._audited = 0
        if isinstance(keeper, Keeper) and keeper.kv_format is not None:
            self._restore(keeper, keeper.kv_format)

    def _restore(self, keeper: Keeper, kv_format: KvFormat) -> None:
        """Go on with what a former kvstore left in this slab."""
        former: list[str] = []
        for worker in keeper.former_workers():
            pidfd = worker.open()
            if pidfd is not None:
                session = self.sessions[worker.incarnation] = Session(worker.incarnation, worker.worker_id)
                session.hang_up()
                self._watch(session, pidfd)
                former.append(worker.incarnation)
            else:
                keeper.forget(worker.incarnation)
        self._use(keeper.restored(self.config.handoff_hold_s, former), kv_format)

    @property
    def block_size(self) -> int:
        return self.kv_format.block_size if self.kv_format else 1

    @property
    def stride(self) -> int:
        return slot_stride(self.kv_format.slot_bytes) if self.kv_format else 0

    # ------------------------------------------------------------------ sessions

    def open(self, incarnation: str, worker_id: str, kv_format: KvFormat) -> Session:
        """A worker attaches. The first one's KV format lays out the slab; raises HeadwayError on another."""
        self._lay_out(kv_format, worker_id)
        former = self.sessions.pop(incarnation, None)
        if former is not None:
            # Only a worker that has stopped writing attaches again.
            former.hang_up()
            self._close_pidfd(former)
            self.store.resolve(incarnation)
            self.settle()
        session = self.sessions[incarnation] = Session(incarnation, worker_id)
        return session

    def mapped(self, session: Session, pid: int) -> None:
        """The process `pid` has the slab's descriptor: watch for its death."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            self._keeper.keep(FormerWorker(session.key, session.worker_id, pid, started_at(pid)))
            self._watch(session, os.pidfd_open(pid))

    def _watch(self, session: Session, pidfd: int) -> None:
        session.pidfd = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._died, session)

    def close(self, session: Session) -> None:
        """The stream broke: what the worker held is free if its process is dead, else quarantined until it is."""
        session.connected = False
        if self.sessions.get(session.key) is not session:
            return
        if session.dead:
            self._resolve(session)
        else:
            log.info("worker=%s event=suspended", session.worker_id)
            self.store.suspend(session.key)
        self.settle()

    def _died(self, session: Session) -> None:
        log.info("worker=%s event=died", session.worker_id)
        session.hang_up()
        self._resolve(session)
        self.settle()

    def _resolve(self, session: Session) -> None:
        self._close_pidfd(session)
        self._keeper.forget(session.key)
        self.store.resolve(session.key)
        if not session.connected and self.sessions.get(session.key) is session:
            del self.sessions[session.key]

    def _close_pidfd(self, session: Session) -> None:
        if session.pidfd is not None:
            asyncio.get_running_loop().remove_reader(session.pidfd)
            os.close(session.pidfd)
            session.pidfd = None

    async def abandoned(self, seconds: float) -> None:
        """Until every process that had the slab is dead, at most so long."""
        deadline_s = time.monotonic() + seconds
        while not all(session.dead for session in self.sessions.values()) and time.monotonic() < deadline_s:
            await asyncio.sleep(TICK_S)

    def _lay_out(self, kv_format: KvFormat, worker_id: str) -> None:
        if self.kv_format == kv_format:
            return
        if kv_format.block_size < 1 or kv_format.bytes_per_token < 1:
            message = (
                f"worker {worker_id} has the KV format {kv_format}: block_size and bytes_per_token must be above 0"
            )
            raise HeadwayError(grpc.StatusCode.INVALID_ARGUMENT, message)
        if self.kv_format is not None and (self.sessions or self.readers or self.pulls):
            message = (
                f"worker {worker_id} has the KV format {kv_format}, this node's slab has {self.kv_format}: "
                "start the worker with the same model and settings, or give it a kvstore of its own"
            )
            raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, message)
        slots = self.segment.size // slot_stride(kv_format.slot_bytes)
        if slots < 1:
            message = (
                f"one block takes {kv_format.slot_bytes} bytes, the slab has {self.segment.size}: enlarge slab_bytes"
            )
            raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, message)
        if self.kv_format is not None:
            # Nothing that watchers were told of is here any more.
            self.epoch = time.time_ns()
        records = self._keeper.lay_out(kv_format)
        self._use(Store(records, kv_format.block_size, self.config.handoff_hold_s), kv_format)
        log.info("event=laid_out slots=%d slot_bytes=%d", slots, kv_format.slot_bytes)

    def _use(self, store: Store, kv_format: KvFormat) -> None:
        self.kv_format, self.store = kv_format, store
        self.memory.lay_out(kv_format.slot_bytes, self.stride, store.pool)
        if self.tiering is not None:
            self.tiering.lay_out()

    # ------------------------------------------------------------------ what follows from operations

    def settle(self) -> None:
        """Send what the last operations mean for others."""
        while instructions := self.store.instructions():
            for instruction in instructions:
                self._carry_out(instruction)
        if self.tiering is not None:
            self.tiering.look()
        if self.store.events.last != self._announced:
            self._announced = self.store.events.last
            for watcher in self.watchers:
                watcher.set()

    def _carry_out(self, instruction: Instruction) -> None:
        if isinstance(instruction, StartPull):
            lease = self.store.leases.get(instruction.lease_id)
            if lease is not None and self.pulls is not None:
                self.pulls.start(lease)
        elif isinstance(instruction, StopPull):
            if self.pulls is not None:
                self.pulls.stop(instruction.lease_id)
        elif isinstance(instruction, Filled):
            for reader in self.readers.values():
                reader.filled(instruction.lease_id)
        elif isinstance(instruction, Offer) and instruction.session in self.readers:
            self.readers[instruction.session].handed_off(instruction.request, instruction.granted)
        elif session := self.sessions.get(instruction.session):
            if isinstance(instruction, Reclaim):
                session.put(pb.AttachReply(reclaim=pb.ReclaimLease(lease_id=instruction.lease_id)))
            elif isinstance(instruction, Offer):
                offer = reply_of("", 0, instruction.granted)
                offer.granted.sequence_id, offer.granted.attempt = instruction.request
                session.put(offer)
            else:
                session.put(reply_of("", instruction.operation_id, instruction.result))

    def pulled(self, lease_id: int, tokens: int, moved_bytes: int) -> None:
        """A pull is over and writes nothing any more. `tokens`: all those of the sequence, when all came."""
        lease = self.store.leases[lease_id]
        slots = list(lease.slots)
        cached = max(tokens, len(lease.blocks) * self.block_size)
        holders = lease.holders - {PULL}
        if self.store.end_pull(lease_id) is not None:
            pulled = pb.LeasePulled(lease_id=lease_id, slots=slots, cached_tokens=cached, bytes=moved_bytes)
            for key in holders:
                if session := self.sessions.get(key):
                    session.put(pb.AttachReply(pulled=pulled))
        self.settle()

    async def tick(self) -> None:
        """Let time pass for the store; recount it when nothing is leased."""
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self.store.tick(now)
            self.settle()
            for session in list(self.sessions.values()):
                if session.connected and now - session.heard_s > self.config.worker_silence_s:
                    log.warning("worker=%s event=silent", session.worker_id)
                    session.hang_up()
                    self.close(session)
            store = self.store
            if not store.leases and self._audited != store.events.last and store.pool.total <= AUDIT_SLOTS:
                self._audited = store.events.last
                for wrong in check_integrity(store):
                    log.error("event=integrity %s", wrong)
