"""Fetching what leases lack from tiers and from other nodes: one task a lease, one transfer a block."""

from __future__ import annotations

import asyncio
import itertools
import logging

from headway.core.flights import Flights
from headway.core.leases import PULL, Lease, Source
from headway.v1 import kvstore_pb2
from headway.v1 import transfer_pb2 as pb
from services.kvstore.node import Node
from services.kvstore.peer_link import PeerError
from services.kvstore.peers import Peer
from services.kvstore.planes.contract import Checksums, Copied, Move, request_blocks
from services.kvstore.tiering import Below

log = logging.getLogger(__name__)

# So many requests' blocks are sealed together, as soon as they are there.
GROUP = 2
# Once prefill is done, the rest of what it sealed is told of within this time.
LAST_WORD_S = 1.0
TRIES = 2


class Pulls:
    """Starts and stops with the node's instructions; tells it what has come and when a pull is over."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._flights = Flights()
        self._checksums = Checksums(node.config.checksum)
        self._peers: dict[str, Peer] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stopped: set[int] = set()
        # Set when the prefill that a lease follows is done.
        self._done: dict[int, asyncio.Event] = {}
        # Leases that wait for another one's transfer.
        self._waiting: dict[int, asyncio.Event] = {}
        self._numbers = itertools.count(1)
        node.pulls = self

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def peers(self) -> list[kvstore_pb2.PeerStats]:
        return [peer.figures for peer in self._peers.values()]

    def start(self, lease: Lease) -> None:
        fetched = _Fetched()
        task = self._tasks[lease.lease_id] = asyncio.create_task(self._run(lease, fetched))
        # Not in the task itself, which may be cancelled before its first line.
        task.add_done_callback(lambda _: self._over(lease.lease_id, fetched))

    def stop(self, lease_id: int) -> None:
        """Nobody holds the lease any more; its transfer goes on only if others wait for it."""
        over = [self._flights.stop(lease_id)]
        if not self._flights.has(lease_id):
            over.append(lease_id)
        for unwanted in over:
            # Once only: a second cancel would cut short the wait for what is still being written.
            if unwanted in self._tasks and unwanted not in self._stopped:
                self._stopped.add(unwanted)
                self._tasks[unwanted].cancel()

    def finish(self, lease_id: int) -> None:
        """The prefill that the lease follows is done."""
        if lease_id in self._done:
            self._done[lease_id].set()

    async def close(self) -> None:
        for lease_id, task in self._tasks.items():
            if lease_id not in self._stopped:
                self._stopped.add(lease_id)
                task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for peer in self._peers.values():
            await peer.close()

    # ------------------------------------------------------------------ one lease

    async def _run(self, lease: Lease, fetched: _Fetched) -> None:
        """Until the blocks are there, or cannot be had."""
        source = lease.source
        assert source is not None
        try:
            if source.follow:
                await self._follow(lease, source, fetched)
                return
            for below in self._node.tiering.tiers if self._node.tiering is not None else ():
                await self._promote(lease, source, below, fetched)
            if source.address:
                await self._prefix(lease, source, fetched)
        except PeerError as error:
            log.warning("event=pull_failed peer=%s reason=%s", source.address, error)
        except Exception:
            log.exception("event=pull_failed peer=%s", source.address)

    def _over(self, lease_id: int, fetched: _Fetched) -> None:
        """Nothing is written for the lease any more: whoever waited for its blocks looks again, its holders go on."""
        self._landed(lease_id)
        self._flights.stop(lease_id)
        self._waiting.pop(lease_id, None)
        del self._tasks[lease_id]
        self._stopped.discard(lease_id)
        self._node.pulled(lease_id, fetched.tokens, fetched.bytes)

    def _landed(self, lease_id: int) -> None:
        for follower in self._flights.ended(lease_id):
            self._waiting.pop(follower).set()

    async def _prefix(self, lease: Lease, source: Source, fetched: _Fetched) -> None:
        """Leading blocks that the peer is believed to have."""
        wanted, tries = min(source.blocks, self._most(lease)), 0
        while (have := self._node.store.adopt(lease.lease_id)) < wanted and tries < TRIES and lease.holders != {PULL}:
            count = await self._turn(lease, lease.keys[have:wanted])
            if count:
                try:
                    whole = await self._transfer(lease, source, have, have + count, fetched)
                finally:
                    self._landed(lease.lease_id)
                tries += not whole

    async def _promote(self, lease: Lease, source: Source, below: Below, fetched: _Fetched) -> None:
        """Leading blocks that a tier of this node has, if they come sooner than they can be computed."""
        tiering, store, most = self._node.tiering, self._node.store, self._most(lease)
        assert tiering is not None
        while (have := store.adopt(lease.lease_id)) < most and lease.holders != {PULL}:
            keys = lease.keys[have:most]
            count = tiering.worth(below, keys, source.prefill_token_s)
            if not count:
                return
            count = await self._turn(lease, keys[:count])
            if count:
                try:
                    if not await self._read(lease, below, have, have + count, fetched):
                        return
                finally:
                    self._landed(lease.lease_id)

    def _most(self, lease: Lease) -> int:
        """Blocks that may be fetched: at least the last token is left to compute."""
        return min((lease.tokens - 1) // self._node.block_size, len(lease.keys))

    async def _turn(self, lease: Lease, keys: list[bytes]) -> int:
        """How many of these blocks to fetch now; 0 after having waited for another lease that was fetching them."""
        count = self._flights.want(lease.lease_id, keys)
        if not count:
            event = self._waiting[lease.lease_id] = asyncio.Event()
            await event.wait()
        return count

    async def _read(self, lease: Lease, below: Below, first: int, end: int, fetched: _Fetched) -> bool:
        """Blocks [first, end) out of a tier; False when not all came."""
        node, size = self._node, GROUP * request_blocks(self._node.memory.slot_bytes)
        assert node.tiering is not None
        for at in range(first, end, size):
            upto = min(at + size, end)
            good = await node.tiering.read(below, lease.keys[at:upto], lease.slots[at:upto])
            fetched.bytes += good * node.memory.slot_bytes
            node.store.fill(lease.lease_id, good)
            node.settle()
            if good < upto - at:
                return False
        return True

    async def _transfer(self, lease: Lease, source: Source, first: int, end: int, fetched: _Fetched) -> bool:
        """Blocks [first, end); False when not all came."""
        peer, pull_id = self._peer(source.address), next(self._numbers)
        try:
            held = await peer.pin(pull_id, lease.keys[:end], first, lease.arrival_s)
            return await self._copy(peer, lease, held, fetched) and first + len(held.slots) >= end
        finally:
            peer.release(pull_id)

    async def _follow(self, lease: Lease, source: Source, fetched: _Fetched) -> None:
        """All that prefill computes, as it is sealed."""
        peer, pull_id = self._peer(source.address), next(self._numbers)
        store, block = self._node.store, self._node.block_size
        done = self._done[lease.lease_id] = asyncio.Event()
        try:
            first = store.adopt(lease.lease_id)
            async for held in peer.follow(pull_id, lease.request, first, done, LAST_WORD_S):
                have = store.adopt(lease.lease_id)
                skip = max(0, have - held.first_block)
                rest = pb.BlocksHeld(
                    first_block=held.first_block + skip,
                    slots=held.slots[skip:],
                    generations=held.generations[skip:],
                    epoch=held.epoch,
                )
                if rest.first_block != have and rest.slots:
                    raise PeerError(f"{source.address} left out blocks of a sequence")
                full = lease.tokens // block - have
                if not await self._copy(peer, lease, rest, fetched, full=full):
                    raise PeerError(f"{source.address} gave up blocks of a sequence before they were read")
                if held.last and held.tokens == lease.tokens:
                    fetched.tokens = held.tokens
        finally:
            del self._done[lease.lease_id]
            peer.release(pull_id)

    async def _copy(
        self, peer: Peer, lease: Lease, held: pb.BlocksHeld, fetched: _Fetched, *, full: int | None = None
    ) -> bool:
        """Copy blocks into the lease's own slots and seal them in order; False at the first that did not come whole.

        `full`: only so many are full, the one after is the partial last one.
        """
        slots = lease.slots[held.first_block : held.first_block + len(held.slots)]
        moves = [Move(*move) for move in zip(held.slots, held.generations, slots, strict=True)]
        size = GROUP * request_blocks(self._node.memory.slot_bytes)
        urgency = (0, lease.arrival_s)
        groups = [
            asyncio.create_task(peer.read(held.epoch, moves[at : at + size], urgency))
            for at in range(0, len(moves), size)
        ]
        try:
            for group in groups:
                copied = await group
                good = next((at for at, what in enumerate(copied) if what is not Copied.GOOD), len(copied))
                sealed = good if full is None else min(good, full)
                full = None if full is None else full - sealed
                fetched.bytes += good * self._node.memory.slot_bytes
                self._node.store.fill(lease.lease_id, sealed)
                self._node.settle()
                if good < len(copied):
                    return False
            return True
        finally:
            # Nothing may write to the slots once this returns.
            for group in groups:
                group.cancel()
            await asyncio.gather(*groups, return_exceptions=True)

    def _peer(self, address: str) -> Peer:
        if address not in self._peers:
            self._peers[address] = Peer(self._node, address, self._checksums)
        return self._peers[address]


class _Fetched:
    """What came for one lease: bytes, and the tokens that lie in its slots when a whole sequence came."""

    def __init__(self) -> None:
        self.bytes = 0
        self.tokens = 0
