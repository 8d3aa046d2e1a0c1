"""What the node owes its tiers and its slots, shown with a tier that is held up."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from headway.core.keys import block_keys
from headway.core.leases import Granted
from headway.core.records import ForgetfulRecords
from headway.core.store import Store
from headway.slab.host import PAGE
from services.kvstore.memory import Pieces, SlabMemory
from services.kvstore.node import Node
from services.kvstore.tiering import Below, Tiering
from services.kvstore.tiers.contract import TierCounts, unchanged

BLOCK, SLOTS = 4, 8


class HeldTier:
    """Takes everything and writes nothing; a read ends when it is let go. `fails`: so many puts first."""

    def __init__(self) -> None:
        self.fails = 0
        self.still: dict[bytes, Callable[[], bool]] = {}
        self.reading, self.let_go = threading.Event(), threading.Event()

    def put(self, key: bytes, parent: bytes, view: memoryview, still: Callable[[], bool] = unchanged) -> bool:
        if self.fails:
            self.fails -= 1
            raise OSError(errno.ENOMEM, "no memory")
        self.still[key] = still
        return True

    def contains(self, key: bytes) -> bool:
        return key in self.still

    def leading(self, keys: Sequence[bytes]) -> int:
        return len(keys)

    def get(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> int:
        self.reading.set()
        assert self.let_go.wait(10)
        return len(keys)

    def flush(self) -> None: ...
    def counts(self) -> TierCounts:
        return TierCounts()

    def close(self) -> None: ...


@pytest.fixture
def store() -> Store:
    return Store(ForgetfulRecords(SLOTS), BLOCK, handoff_hold_s=1.0)


@pytest.fixture
def tier() -> Iterator[HeldTier]:
    tier = HeldTier()
    yield tier
    tier.let_go.set()


@pytest.fixture
def slab() -> Iterator[tuple[int, int]]:
    """Descriptor and size."""
    descriptor = os.memfd_create("headway-test")
    os.truncate(descriptor, PAGE)
    yield descriptor, PAGE
    os.close(descriptor)


@pytest.fixture
def tiering(store: Store, slab: tuple[int, int]) -> Tiering:
    memory = SlabMemory(*slab)
    memory.lay_out(64, 64, store.pool)
    node: Any = SimpleNamespace(
        config=None, store=store, memory=memory, block_size=BLOCK, kv_format=None, settle=lambda: None
    )
    return Tiering(cast("Node", node))


def compute(store: Store, name: int, blocks: int) -> list[bytes]:
    tokens = [name] * (blocks * BLOCK)
    keys = block_keys(b"n", tokens, BLOCK)
    lease = store.acquire("w", 1, keys=keys, tokens=len(tokens), growth=0, arrival_s=0.0, deadline_s=1.0)
    assert isinstance(lease, Granted)
    store.seal("w", lease.lease_id, first=0, keys=keys, parent=b"")
    store.release("w", lease.lease_id)
    return keys


async def written(tiering: Tiering, tier: HeldTier, keys: list[bytes]) -> None:
    task = asyncio.create_task(tiering.run())
    await asyncio.sleep(0.01)
    tiering.tiers.append(Below("held", tier))
    tiering.look()
    async with asyncio.timeout(10):
        while not set(keys) <= set(tier.still):
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_slot_that_was_given_out_anew_is_no_longer_the_block(
    store: Store, tiering: Tiering, tier: HeldTier
) -> None:
    first = compute(store, 1, 4)
    compute(store, 2, 4)
    # Half of the slots are written ahead: the first chain.
    await written(tiering, tier, first)
    assert all(tier.still[key]() for key in first)
    compute(store, 3, 1)
    assert [tier.still[key]() for key in first] == [True, True, True, False]


async def test_a_write_that_fails_is_tried_again(store: Store, tiering: Tiering, tier: HeldTier) -> None:
    """The kvstore serves on, and no block is lost to the tiers for good."""
    keys = compute(store, 1, 8)
    tier.fails = 1
    await written(tiering, tier, keys[6:])
    assert not tier.fails


async def test_a_slab_laid_out_anew_has_none_of_the_former_blocks(
    store: Store, tiering: Tiering, tier: HeldTier
) -> None:
    keys = compute(store, 1, 8)
    await written(tiering, tier, keys[6:])
    cast(Any, tiering)._node.store = Store(ForgetfulRecords(SLOTS), BLOCK, handoff_hold_s=1.0)
    assert not any(tier.still[key]() for key in keys[6:])


async def test_a_read_that_is_given_up_ends_only_when_nothing_is_written_any_more(
    tiering: Tiering, tier: HeldTier
) -> None:
    reading = asyncio.create_task(tiering.read(Below("held", tier), [b"k"], [0]))
    await asyncio.to_thread(tier.reading.wait, 10)
    reading.cancel()
    await asyncio.sleep(0.05)
    assert not reading.done()
    tier.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await reading


class Staged(SlabMemory):
    """One block at a time, all by way of the same few bytes, as a device's slab may be."""

    lasting = False

    def outgoing(self, slots: Sequence[int]) -> Pieces:
        return self._one_by_one(slots, out=True)

    def incoming(self, slots: Sequence[int]) -> Pieces:
        return self._one_by_one(slots, out=False)

    def _one_by_one(self, slots: Sequence[int], *, out: bool) -> Pieces:
        staging = memoryview(bytearray(self.slot_bytes))
        for slot in slots:
            staging[:] = self.view(slot) if out else bytes(self.slot_bytes)
            yield [staging]
            if not out:
                self.view(slot)[:] = staging
            staging[:] = bytes(self.slot_bytes)


class LateTier(HeldTier):
    """Reads what it was given when it is flushed, and gives what it is told to have."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[bytes, memoryview] = {}
        self.kept: dict[bytes, bytes] = {}

    def put(self, key: bytes, parent: bytes, view: memoryview, still: Callable[[], bool] = unchanged) -> bool:
        self.views[key] = view
        return super().put(key, parent, view, still)

    def flush(self) -> None:
        self.kept |= {key: bytes(view) for key, view in self.views.items()}
        self.views.clear()

    def get(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> int:
        for at, (key, view) in enumerate(zip(keys, views, strict=True)):
            if key not in self.kept:
                return at
            view[:] = self.kept[key]
        return len(keys)


@pytest.fixture
def staged(tiering: Tiering, slab: tuple[int, int], store: Store) -> Staged:
    memory = Staged(*slab)
    memory.lay_out(64, 64, store.pool)
    cast(Any, tiering)._node.memory = memory
    return memory


async def test_blocks_that_come_by_way_of_staging_are_kept_right(
    store: Store, tiering: Tiering, staged: Staged
) -> None:
    tier = LateTier()
    keys = compute(store, 1, 8)
    for slot in range(SLOTS):
        staged.view(slot)[:] = bytes([slot + 1]) * 64
    # Half of the slots, from the chain's end on.
    await written(tiering, tier, keys[4:])
    async with asyncio.timeout(10):
        while not set(keys[4:]) <= set(tier.kept):
            await asyncio.sleep(0.01)
    for key in keys[4:]:
        block = store.cache.get(key)
        assert block is not None
        assert tier.kept[key] == bytes(staged.view(block.slot))


async def test_what_comes_after_a_block_that_is_missing_does_not_count(tiering: Tiering, staged: Staged) -> None:
    tier, keys = LateTier(), [b"a", b"b", b"c", b"d"]
    tier.kept = {key: key * 64 for key in (b"a", b"b", b"d")}
    assert await tiering.read(Below("late", tier), keys, [3, 1, 2, 0]) == 2
    assert [bytes(staged.view(slot)) for slot in (3, 1)] == [b"a" * 64, b"b" * 64]
