"""KvStoreService: Attach, WatchBlocks, Stats."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncIterator

import grpc

from headway.core.audit import check_integrity
from headway.core.events import BlockEvent, merge
from headway.core.keys import join_keys
from headway.runtime.convert import kv_format_from_proto, kv_format_to_proto
from headway.runtime.errors import HeadwayError, abort
from headway.slab.device import DeviceSegment
from headway.slab.host import HostSegment
from headway.v1 import kvstore_pb2 as pb
from headway.v1 import kvstore_pb2_grpc
from services.kvstore.node import Node
from services.kvstore.operations import Operations
from services.kvstore.session import Session

log = logging.getLogger(__name__)

MESSAGE_KEYS = 2000
# The router's index is a hint: under load, this late in exchange for a message for every few requests.
MERGE_S = 0.005
Context = grpc.aio.ServicerContext[pb.AttachRequest, pb.AttachResponse]
WatchContext = grpc.aio.ServicerContext[pb.WatchBlocksRequest, pb.WatchBlocksResponse]
StatsContext = grpc.aio.ServicerContext[pb.StatsRequest, pb.StatsResponse]


class KvStoreServicer(kvstore_pb2_grpc.KvStoreServiceServicer):
    def __init__(self, node: Node, socket_path: str) -> None:
        self._node = node
        self._operations = Operations(node)
        self._socket_path = socket_path

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context
    ) -> AsyncIterator[pb.AttachResponse]:
        requests = aiter(request_iterator)
        session = await self._hello(requests, context)
        reader = asyncio.create_task(self._read(requests, session))
        try:
            yield pb.AttachResponse(welcome=self._welcome(session))
            while session.connected:
                await session.wake.wait()
                session.wake.clear()
                replies, session.replies = session.replies, []
                if replies:
                    free = self._node.store.pool.free + self._node.store.cache.idle
                    yield pb.AttachResponse(replies=pb.AttachReplies(replies=replies, free_slots=free))
        finally:
            reader.cancel()
            self._node.close(session)

    async def _hello(self, requests: AsyncIterator[pb.AttachRequest], context: Context) -> Session:
        first = await anext(requests, None)
        if first is None or not first.HasField("hello") or not first.hello.incarnation:
            await abort(context, HeadwayError(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello"))
        assert first is not None
        hello = first.hello
        try:
            return self._node.open(hello.incarnation, hello.worker_id, kv_format_from_proto(hello.kv_format))
        except HeadwayError as error:
            await abort(context, error)
            raise

    async def _read(self, requests: AsyncIterator[pb.AttachRequest], session: Session) -> None:
        try:
            async for request in requests:
                if not session.connected:
                    log.warning("worker=%s event=cut_off waiting_replies=%d", session.worker_id, len(session.replies))
                    break
                self._operations.handle(session, request.operations)
        except Exception:
            log.exception("worker=%s event=attach_failed", session.worker_id)
        finally:
            self._node.close(session)
            session.hang_up()

    def _welcome(self, session: Session) -> pb.AttachWelcome:
        node = self._node
        return pb.AttachWelcome(
            device=_device(node.segment),
            node_id=node.config.node_id,
            epoch=node.epoch,
            total_slots=node.store.pool.total,
            slot_stride=node.stride,
            slot_bytes=node.kv_format.slot_bytes if node.kv_format else 0,
            socket_path=self._socket_path,
            secret=session.secret,
        )

    async def WatchBlocks(
        self, request: pb.WatchBlocksRequest, context: WatchContext
    ) -> AsyncIterator[pb.WatchBlocksResponse]:
        node, wake = self._node, asyncio.Event()
        node.watchers.add(wake)
        try:
            store, number = node.store, request.after_sequence_number
            if request.epoch != node.epoch or store.events.since(number) is None:
                number = store.events.last
                for message in self._snapshot(number):
                    yield message
            while True:
                if node.store is not store:
                    # Laid out since: its events count from 0.
                    store, number = node.store, 0
                events = store.events.since(number)
                if events is None:
                    number = store.events.last
                    for message in self._snapshot(number):
                        yield message
                    continue
                for event in merge(events, MESSAGE_KEYS):
                    number = event.last
                    yield self._event(event)
                if number == store.events.last and store is node.store:
                    wake.clear()
                    await wake.wait()
                    await asyncio.sleep(MERGE_S)
        finally:
            node.watchers.discard(wake)

    def _snapshot(self, number: int) -> list[pb.WatchBlocksResponse]:
        """One moment's blocks, in messages of a bounded number of keys."""
        epoch = self._node.epoch

        def message(**event: object) -> pb.WatchBlocksResponse:
            return pb.WatchBlocksResponse(epoch=epoch, sequence_number=number, **event)  # type: ignore[arg-type]

        keys = self._node.store.snapshot()
        pieces = [keys[at : at + MESSAGE_KEYS] for at in range(0, len(keys), MESSAGE_KEYS)]
        stored = [message(stored=pb.BlocksStored(block_keys=join_keys(piece))) for piece in pieces]
        return [message(snapshot_begin=pb.SnapshotBegin()), *stored, message(snapshot_end=pb.SnapshotEnd())]

    def _event(self, event: BlockEvent) -> pb.WatchBlocksResponse:
        message = pb.WatchBlocksResponse(
            epoch=self._node.epoch, sequence_number=event.last, first_sequence_number=event.first
        )
        if event.removed:
            message.removed.block_keys = join_keys(event.keys)
        else:
            message.stored.block_keys = join_keys(event.keys)
        return message

    async def Stats(self, request: pb.StatsRequest, context: StatsContext) -> pb.StatsResponse:
        node, store = self._node, self._node.store
        counts = store.counts()
        reply = pb.StatsResponse(
            node_id=node.config.node_id,
            epoch=node.epoch,
            total_slots=store.pool.total,
            free_slots=counts["free"],
            leased_slots=counts["leased"],
            cached_slots=counts["cached"],
            quarantined_slots=counts["quarantined"],
            leases=len(store.leases),
            waiting_acquires=len(store.waiters),
            slot_stride=node.stride,
            workers=sorted(session.worker_id for session in node.sessions.values() if session.connected),
            hit_tokens=store.hit_tokens,
            missed_tokens=store.missed_tokens,
            evicted_blocks=store.evicted_blocks,
            pid=os.getpid(),
            peers=node.pulls.peers if node.pulls is not None else (),
            corrupt_blocks=node.corrupt_blocks,
            stale_blocks=node.stale_blocks,
            transfers_in_flight=len(node.pulls) if node.pulls is not None else 0,
            tiers=node.tiering.stats if node.tiering is not None else (),
            unwritten_blocks=node.tiering.unwritten if node.tiering is not None else 0,
        )
        if node.kv_format is not None:
            reply.kv_format.CopyFrom(kv_format_to_proto(node.kv_format))
        if request.check_integrity:
            reply.integrity_errors.extend(check_integrity(store))
        if request.checksum_blocks and node.kv_format is not None:
            reply.checksums.extend(await self._checksums())
        return reply

    async def _checksums(self) -> list[pb.BlockChecksum]:
        """Of all sealed blocks; one whose slot changed hands while it was read is left out (its generation tells)."""
        node, generations = self._node, self._node.store.pool.generations
        blocks = [(block.key, block.slot, generations[block.slot]) for block in node.store.cache]
        slots = [slot for _, slot, _ in blocks]

        def digest_all() -> list[bytes]:
            pieces = node.memory.outgoing(slots)
            return [hashlib.blake2b(view, digest_size=16).digest() for views in pieces for view in views]

        digests = await asyncio.to_thread(digest_all)
        return [
            pb.BlockChecksum(block_key=key, checksum=checksum)
            for (key, slot, generation), checksum in zip(blocks, digests, strict=True)
            if generations[slot] == generation
        ]


def _device(segment: HostSegment | DeviceSegment) -> pb.SlabDevice | None:
    if isinstance(segment, HostSegment):
        return None
    device = segment.device
    return pb.SlabDevice(kind=device.module.kind, index=device.index, bus_id=device.bus_id, bytes=segment.size)
