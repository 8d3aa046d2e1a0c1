"""A worker's side of Attach: the mapped slab, and operations on leases with their replies.

Rule: an operation on a lease acknowledges all earlier replies about that lease, so the next one is sent only after the
slot changes of the last were applied (the engine loop sees to it).
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from headway.core.model import ModelCard
from headway.engine.contract import SlabArray
from headway.runtime.channels import open_channel
from headway.runtime.convert import kv_format_to_proto
from headway.runtime.errors import HeadwayError
from headway.slab.device import Device
from headway.v1 import common_pb2, kvstore_pb2, kvstore_pb2_grpc
from headway.worker import operations
from headway.worker.lost import StoreLost
from headway.worker.mapping import Mapped, map_slab

log = logging.getLogger(__name__)

OnReply = Callable[[kvstore_pb2.AttachReply], None]
RECONNECT_S = 0.2
RENEW_S = 0.5


@dataclass(slots=True)
class Slab:
    """The mapped slab: `view` is uint8 [slots, slot_stride]. `folder`: the kvstore's, the same for all of the node."""

    view: SlabArray
    epoch: int
    node_id: str
    total_slots: int
    free_slots: int
    folder: Path = Path()


@dataclass(slots=True)
class _Session:
    operations: list[kvstore_pb2.AttachOperation] = field(default_factory=list)
    waiting: dict[int, OnReply] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Attachment:
    """Keeps one worker attached to its kvstore, again and again; on a device, once.

    on_attached(slab): the slab is mapped, operations may be submitted.
    on_lost(): awaited before the next try; returns only when nothing writes to the slab any more.
    on_reclaim(lease_id): the store wants these slots back.
    on_offer(granted): a lease passed to this worker by handoff.
    on_pulled(pulled): what was to be fetched for a lease from another node is there, as far as it could be had.
    """

    def __init__(
        self,
        address: str,
        worker_id: str,
        card: ModelCard,
        device: Device | None = None,
        *,
        on_attached: Callable[[Slab], None],
        on_lost: Callable[[], Awaitable[None]],
        on_reclaim: Callable[[int], None],
        on_offer: Callable[[kvstore_pb2.LeaseGranted], None],
        on_pulled: Callable[[kvstore_pb2.LeasePulled], None],
    ) -> None:
        self._address = address
        self._hello = kvstore_pb2.AttachHello(
            worker_id=worker_id,
            pid=os.getpid(),
            kv_format=kv_format_to_proto(card.kv_format),
            incarnation=uuid.uuid4().hex,
        )
        self._on_attached, self._on_lost = on_attached, on_lost
        self._on_reclaim, self._on_offer, self._on_pulled = on_reclaim, on_offer, on_pulled
        self._device = device
        self._mapped: Mapped | None = None
        self._session: _Session | None = None
        self._was_attached = False
        self._last_id = 0
        self.slab: Slab | None = None

    async def run(self) -> None:
        """Attach for ever. Raises HeadwayError when the store refuses this worker for good (KV format, device), and
        StoreLost when it was attached on a device and is not any more.
        """
        while True:
            try:
                await self._attach_once()
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                    raise HeadwayError(error.code(), error.details() or "the kvstore refused this worker") from None
                log.info("kvstore=%s event=detached code=%s", self._address, error.code().name)
            except OSError as error:
                log.info("kvstore=%s event=detached error=%s", self._address, error)
            if self._device is not None and self._was_attached:
                log.error("kvstore=%s event=store_lost device=%s", self._address, self._device)
                message = f"the kvstore went away, and the slab on {self._device} with it; start this worker again"
                raise StoreLost(grpc.StatusCode.UNAVAILABLE, message)
            await asyncio.sleep(RECONNECT_S)

    def submit(self, operation: kvstore_pb2.AttachOperation, on_reply: OnReply | None = None) -> None:
        """Send an operation; all of one loop tick go in one message. Dropped when detached: on_lost follows."""
        session = self._session
        if session is None:
            return
        if on_reply is not None:
            self._last_id += 1
            operation.operation_id = self._last_id
            session.waiting[self._last_id] = on_reply
        session.operations.append(operation)
        session.wake.set()

    async def _attach_once(self) -> None:
        session = _Session()
        renewing = asyncio.create_task(self._renew())
        async with open_channel(self._address) as channel:
            call = kvstore_pb2_grpc.KvStoreServiceStub(channel).Attach(self._requests(session))
            try:
                async for response in call:
                    if response.HasField("welcome"):
                        await self._welcomed(session, response.welcome)
                    else:
                        self._answer(session, response.replies)
            finally:
                renewing.cancel()
                call.cancel()
                if self._session is not None:
                    self._session = None
                    await self._on_lost()
                    self.slab = None
                if self._mapped is not None:
                    mapped, self._mapped = self._mapped, None
                    mapped.close()

    async def _renew(self) -> None:
        """Say that this worker lives, as long as it does."""
        while True:
            await asyncio.sleep(RENEW_S)
            self.submit(operations.renew())

    async def _requests(self, session: _Session) -> AsyncIterator[kvstore_pb2.AttachRequest]:
        yield kvstore_pb2.AttachRequest(hello=self._hello)
        while True:
            await session.wake.wait()
            session.wake.clear()
            operations, session.operations = session.operations, []
            yield kvstore_pb2.AttachRequest(operations=kvstore_pb2.AttachOperations(operations=operations))

    async def _welcomed(self, session: _Session, welcome: kvstore_pb2.AttachWelcome) -> None:
        # Populating a large slab takes longer than the event loop may stand still.
        self._mapped = await asyncio.to_thread(map_slab, welcome, self._device)
        view, slots = self._mapped.view, welcome.total_slots
        folder = Path(welcome.socket_path).parent
        self.slab = Slab(view, welcome.epoch, welcome.node_id, slots, slots, folder)
        self._was_attached = True
        self._session = session
        log.info("kvstore=%s event=attached slots=%d epoch=%d", self._address, welcome.total_slots, welcome.epoch)
        self._on_attached(self.slab)

    def _answer(self, session: _Session, replies: kvstore_pb2.AttachReplies) -> None:
        if self.slab is not None:
            self.slab.free_slots = replies.free_slots
        for reply in replies.replies:
            if reply.operation_id == 0 and reply.HasField("granted"):
                self._on_offer(reply.granted)
            elif reply.operation_id == 0 and reply.HasField("pulled"):
                self._on_pulled(reply.pulled)
            elif reply.operation_id == 0:
                self._on_reclaim(reply.reclaim.lease_id)
            elif on_reply := session.waiting.pop(reply.operation_id, None):
                on_reply(reply)


def failed(reply: kvstore_pb2.AttachReply) -> common_pb2.Failure | None:
    """The reply's failure, if it is one."""
    return reply.failure if reply.HasField("failure") else None
