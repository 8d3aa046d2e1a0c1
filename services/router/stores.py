"""Keep the prefix index of one kvstore current from its block events, through breaks and gaps."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc

from headway.core.index import PrefixIndex
from headway.core.links import Links
from headway.runtime.channels import open_channel
from headway.v1 import kvstore_pb2, kvstore_pb2_grpc

log = logging.getLogger(__name__)

RECONNECT_S = 0.2
STATS_S = 1.0
# Between two looks at how fast its pulls were.
LINKS_S = 5.0
# Between two accounts of a node because there is room for more of it.
RELEARN_S = 60.0


class StoreWatch:
    """Follows WatchBlocks of the store at `address` until closed; that address is the node's name in the index."""

    def __init__(self, address: str, node_id: str, index: PrefixIndex, links: Links) -> None:
        self.address = address
        self.node_id = node_id
        self.users = 0
        self.watching = False
        self.epoch = 0
        self.last = 0
        self._index = index
        self._links = links
        self._in_snapshot = False
        self._relearn_at_s = 0.0
        # Bytes and seconds of its pulls from each peer, as last seen.
        self._pulled: dict[str, tuple[int, float]] = {}
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._time_links())]

    async def stats(self) -> kvstore_pb2.StatsResponse:
        """The store's own figures; empty when it does not give them soon."""
        try:
            async with open_channel(self.address) as channel:
                stub: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel)
                reply: kvstore_pb2.StatsResponse = await stub.Stats(kvstore_pb2.StatsRequest(), timeout=STATS_S)
                return reply
        except grpc.aio.AioRpcError:
            return kvstore_pb2.StatsResponse()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._index.forget(self.address)

    async def _time_links(self) -> None:
        """What pulls took since the last look says how fast the links to this node are; the first time, what they took
        since the store started, so that a router that comes back knows it at once.
        """
        while True:
            for peer in (await self.stats()).peers:
                size, busy_s = self._pulled.get(peer.address, (0, 0.0))
                self._pulled[peer.address] = peer.bytes, peer.busy_s
                if peer.bytes > size:
                    link = self._links.between(peer.address, self.address)
                    link.observe(peer.bytes - size, peer.busy_s - busy_s)
            await asyncio.sleep(LINKS_S)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except grpc.aio.AioRpcError as error:
                log.info("store=%s event=watch_ended code=%s", self.address, error.code().name)
            except ValueError as error:
                log.warning("store=%s event=watch_refused reason=%s", self.address, error)
                self._start_over()
            self.watching = False
            await asyncio.sleep(RECONNECT_S)

    async def _follow(self) -> None:
        async with open_channel(self.address) as channel:
            stub: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel)
            if self._in_snapshot:
                self._start_over()
            request = kvstore_pb2.WatchBlocksRequest(epoch=self.epoch, after_sequence_number=self.last)
            async for response in stub.WatchBlocks(request):
                if not self.apply(response):
                    log.info("store=%s event=gap last=%d got=%d", self.address, self.last, response.sequence_number)
                    self._start_over()
                    return
                if self._may_relearn():
                    log.info("store=%s event=index_has_room", self.address)
                    self._start_over()
                    return

    def _may_relearn(self) -> bool:
        """Now and then: an account of this node makes room while it comes, which others may take for theirs."""
        now_s = time.monotonic()
        if self._in_snapshot or now_s < self._relearn_at_s or not self._index.may_relearn(self.address):
            return False
        self._relearn_at_s = now_s + RELEARN_S
        return True

    def apply(self, response: kvstore_pb2.WatchBlocksResponse) -> bool:
        """Take one message into the index; False when events before it are missing."""
        kind, first = response.WhichOneof("event"), response.first_sequence_number
        if kind == "snapshot_begin":
            self._index.snapshot(self.address)
            self._in_snapshot = True
            self.epoch = response.epoch
        elif response.epoch != self.epoch or (not self._in_snapshot and first != self.last + 1):
            return False
        elif kind == "stored":
            self._store(response.stored.block_keys)
        elif kind == "removed":
            self._index.removed(self.address, response.removed.block_keys)
        elif kind == "snapshot_end":
            self._in_snapshot = False
        self.last = response.sequence_number
        self.watching = not self._in_snapshot
        return True

    def _store(self, keys: bytes) -> None:
        was_full = self._index.full(self.address)
        if not self._index.stored(self.address, keys) and not was_full:
            blocks = self._index.blocks(self.address)
            log.warning("store=%s event=index_full blocks=%d: more are not remembered", self.address, blocks)

    def _start_over(self) -> None:
        """Ask for a snapshot next; until it comes, what is known stays as a guess."""
        self.epoch = self.last = 0
        self._in_snapshot = False
