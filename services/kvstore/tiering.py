"""The tiers below a node's slab: blocks go down before their slots are needed, and come up where that beats computing.

Write-back: a task writes what the slab would evict next. Eviction itself does not ask whether it has: a block that goes
before its turn is lost to the tiers, and no request ever waits for a write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import NamedTuple

from headway.core.blocks import Block
from headway.core.model import KvFormat
from headway.core.promote import ReadCost
from headway.core.store import Store
from headway.slab.host import SlabError
from headway.v1 import kvstore_pb2 as pb
from services.kvstore.config import KvStoreConfig
from services.kvstore.memory import Pieces
from services.kvstore.node import Node
from services.kvstore.planes.contract import all_over
from services.kvstore.tiers.contract import Tier, TierError
from services.kvstore.tiers.disk import DiskTier
from services.kvstore.tiers.host import HostTier
from services.kvstore.tiers.link import LinkOptions
from services.kvstore.tiers.remote import RemoteTier

log = logging.getLogger(__name__)

# Free slots, and idle blocks that are written already, should be so many together: of the slab, and at most.
AHEAD, MOST_AHEAD = 2, 1024
# Blocks written before the next are looked for.
BATCH = 64
# Between two looks at what goes next, and after a tier took nothing.
LOOK_S, PAUSE_S = 0.02, 1.0
# At the same time, of all requests.
READS = 2
EVENT_KEYS = 1000
# A request waits for the remote tier's server: not longer than this for one answer.
REMOTE_TIMEOUT_S = 0.25

_Opened = Callable[[], Tier]


class Below:
    """A tier, and what reading from it costs."""

    def __init__(self, name: str, tier: Tier) -> None:
        self.name = name
        self.tier = tier
        self.cost = ReadCost()

    @property
    def stats(self) -> pb.TierStats:
        return pb.TierStats(name=self.name, read_block_s=self.cost.block_s, **asdict(self.tier.counts()))


class _Victim(NamedTuple):
    """A block that the slab evicts soon; `still`: its slot has not been given out anew."""

    key: bytes
    parent: bytes
    slot: int
    still: Callable[[], bool]


class Tiering:
    """Opens the configured tiers whenever the slab is laid out; a tier that cannot be had is one line in the log."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._config: KvStoreConfig = node.config
        self._laid_out, self._short = asyncio.Event(), asyncio.Event()
        self._laid_out.set()
        self._readers = ThreadPoolExecutor(READS, "tier-read")
        self._writer = ThreadPoolExecutor(1, "tier-flush")
        # The nearest first.
        self.tiers: list[Below] = []
        node.tiering = self

    @property
    def stats(self) -> list[pb.TierStats]:
        return [below.stats for below in self.tiers]

    @property
    def unwritten(self) -> int:
        """Of the blocks that would be evicted next, those that no tier has yet."""
        return sum(1 for _ in self._unwritten(self._node.store)) if self.tiers else 0

    # ------------------------------------------------------------------ opening and closing

    def lay_out(self) -> None:
        """The slab has another KV format from now on."""
        self._laid_out.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_open())
            tasks.create_task(self._write_back())

    async def _keep_open(self) -> None:
        while True:
            await self._laid_out.wait()
            self._laid_out.clear()
            await self._close_tiers()
            if self._node.kv_format is not None:
                await self._open(self._node.kv_format, self._node.store)

    async def _open(self, kv_format: KvFormat, store: Store) -> None:
        for name, opened in self._wanted(kv_format, self._teller(store)).items():
            try:
                tier = await asyncio.to_thread(opened)
            except (TierError, OSError) as error:
                log.error("event=tier_off tier=%s reason=%s", name, error)
                continue
            if isinstance(tier, DiskTier):
                keys = tier.keys()
                for at in range(0, len(keys), EVENT_KEYS):
                    store.below_changed(keys[at : at + EVENT_KEYS], [])
                    # There may be a million of them.
                    await asyncio.sleep(0)
            self.tiers.append(Below(name, tier))
        self._node.settle()

    def _wanted(self, kv_format: KvFormat, changed: Callable[[list[bytes], list[bytes]], None]) -> dict[str, _Opened]:
        """The configured tiers, fastest first, and how each is opened."""
        config, slot_bytes, digest = self._config, kv_format.slot_bytes, kv_format.digest()
        options = LinkOptions(timeout_s=REMOTE_TIMEOUT_S)
        wanted: dict[str, _Opened] = {}
        if config.host_bytes:
            wanted["host"] = partial(HostTier, config.host_bytes, slot_bytes, changed)
        if config.disk_dir:
            wanted["disk"] = partial(DiskTier.open, config.disk_file, config.disk_bytes, slot_bytes, digest, changed)
        if config.remote_url:
            wanted["remote"] = partial(RemoteTier.open, config.remote_url, slot_bytes, digest, options)
        return wanted

    def _teller(self, store: Store) -> Callable[[list[bytes], list[bytes]], None]:
        """For the threads of this node's tiers: what they hold now, told on the event loop."""
        loop = asyncio.get_running_loop()

        def tell(stored: list[bytes], removed: list[bytes]) -> None:
            local = [below.tier for below in self.tiers if not isinstance(below.tier, RemoteTier)]
            store.below_changed(stored, [key for key in removed if not any(tier.contains(key) for tier in local)])
            self._node.settle()

        def changed(stored: list[bytes], removed: list[bytes]) -> None:
            # At the very end the loop may be gone before the tier.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(tell, stored, removed)

        return changed

    async def close(self) -> None:
        """What was accepted is written; nothing of the slab is touched afterwards."""
        await self._close_tiers()
        self._readers.shutdown()
        self._writer.shutdown()

    async def _close_tiers(self) -> None:
        tiers, self.tiers = self.tiers, []
        for below in tiers:
            await asyncio.to_thread(below.tier.close)

    # ------------------------------------------------------------------ down

    def look(self) -> None:
        """Slots were taken or given."""
        if self.tiers and self._node.store.pool.free < self._ahead(self._node.store):
            self._short.set()

    def _ahead(self, store: Store) -> int:
        return min(store.pool.total // AHEAD, MOST_AHEAD)

    async def _write_back(self) -> None:
        while True:
            await self._short.wait()
            self._short.clear()
            while victims := self._next_victims(self._node.store):
                try:
                    await self._write(victims)
                except (SlabError, TierError, OSError) as error:
                    log.error("event=write_back_failed reason=%s", error)
                if not any(self._kept(block) for block in victims):
                    await asyncio.sleep(PAUSE_S)
            await asyncio.sleep(LOOK_S)

    def _next_victims(self, store: Store) -> list[Block]:
        return list(islice(self._unwritten(store), BATCH))

    def _unwritten(self, store: Store) -> Iterator[Block]:
        """Of the blocks that go next, those that no tier has."""
        near = islice(store.cache.next_out(), max(0, self._ahead(store) - store.pool.free))
        return (block for block in near if not self._kept(block))

    def _kept(self, block: Block) -> bool:
        return any(below.tier.contains(block.key) for below in self.tiers)

    def _mark(self, store: Store, block: Block) -> _Victim:
        generations, slot, generation = store.pool.generations, block.slot, store.pool.generations[block.slot]

        def still() -> bool:
            return self._node.store is store and generations[slot] == generation

        return _Victim(block.key, block.parent.key if block.parent is not None else b"", slot, still)

    async def _write(self, blocks: list[Block]) -> None:
        """Until the tiers have carried it out."""
        memory, tiers = self._node.memory, list(self.tiers)
        victims = [self._mark(self._node.store, block) for block in blocks]
        pieces = memory.outgoing([victim.slot for victim in victims])

        def write() -> None:
            with contextlib.closing(pieces):
                views = (view for piece in pieces for view in piece)
                for victim, view in zip(victims, views, strict=False):
                    lasting = view if memory.lasting else _copy(view)
                    for below in tiers:
                        if not below.tier.contains(victim.key):
                            below.tier.put(victim.key, victim.parent, lasting, victim.still)
            for below in tiers:
                below.tier.flush()

        await asyncio.get_running_loop().run_in_executor(self._writer, write)

    # ------------------------------------------------------------------ up

    def promising(self, keys: Sequence[bytes], prefill_token_s: float) -> bool:
        """A tier may have the first of these blocks, sooner than it can be computed."""
        return any(self.worth(below, keys, prefill_token_s) for below in self.tiers)

    def worth(self, below: Below, keys: Sequence[bytes], prefill_token_s: float) -> int:
        """How many leading blocks to read from this tier rather than to compute; of the remote tier, to ask for."""
        token_s = prefill_token_s * self._node.block_size
        if isinstance(below.tier, RemoteTier):
            asked = len(keys) if below.tier.up and below.cost.may_ask(len(keys) * token_s) else 0
            return asked if asked and below.cost.beats(asked, asked * token_s) else 0
        count = below.tier.leading(keys)
        return count if count and below.cost.beats(count, count * token_s) else 0

    async def read(self, below: Below, keys: Sequence[bytes], slots: Sequence[int]) -> int:
        """Blocks into slots that nobody else uses; how many of the leading ones came. Writes nothing once it ends."""
        pieces = self._node.memory.incoming(slots)
        below.cost.begin(len(keys))
        good, started = 0, time.monotonic()
        reading = asyncio.get_running_loop().run_in_executor(self._readers, _get, below.tier, keys, pieces)
        try:
            good = await asyncio.shield(reading)
        except asyncio.CancelledError:
            await all_over([reading])
            raise
        finally:
            below.cost.ended(len(keys), good, time.monotonic() - started)
        return good


def _get(tier: Tier, keys: Sequence[bytes], pieces: Pieces) -> int:
    """In a reader's thread."""
    good = at = 0
    with contextlib.closing(pieces):
        for views in pieces:
            if good == at:
                good += tier.get(keys[at : at + len(views)], views)
            at += len(views)
    return good


def _copy(view: memoryview) -> memoryview:
    """Page-aligned, which a disk takes without another copy."""
    copy = memoryview(mmap.mmap(-1, len(view)))
    copy[:] = view
    return copy
