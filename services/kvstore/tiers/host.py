"""The host tier: what a slab on a device evicts, in memory of the host."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from headway.slab.host import available_memory
from services.kvstore.tiers.contract import TierCounts, TierError, unchanged
from services.kvstore.tiers.disk import Changed, ignore
from services.kvstore.tiers.index import SlotIndex


class HostTier:
    """See `contract.Tier`; `put` copies before it returns. Gone with the process.

    `changed(stored, removed)` is called under the lock: it must only pass the news on.
    """

    def __init__(self, capacity_bytes: int, slot_bytes: int, changed: Changed = ignore) -> None:
        """All memory is taken at once, which lasts. Raises TierError when there is none."""
        slots = capacity_bytes // slot_bytes
        if not slots:
            raise TierError(f"host_bytes is {capacity_bytes}; one block takes {slot_bytes} bytes: enlarge it")
        free = available_memory()
        if slots * slot_bytes > free:
            raise TierError(f"host_bytes is {capacity_bytes}; the host has {free} bytes free: make it smaller")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._bytes = memoryview(mmap.mmap(-1, slots * slot_bytes, flags=flags))
        self._slot_bytes, self._changed = slot_bytes, changed
        self._lock = threading.Lock()
        self._index = SlotIndex(slots)
        self._counts = TierCounts()
        self._closed = False

    def put(self, key: bytes, parent: bytes, view: memoryview, still: Callable[[], bool] = unchanged) -> bool:
        if len(view) != self._slot_bytes:
            raise ValueError(f"a block here is {self._slot_bytes} bytes; this view has {len(view)}")
        with self._lock:
            if self._closed:
                return False
            if (entry := self._index.get(key)) is not None:
                self._index.touch([entry])
                return True
            taken = self._index.take_slot()
            if taken is None:
                self._count(dropped=1)
                return False
        slot, victim = taken
        self._view(slot)[:] = view
        kept = still()
        with self._lock:
            # Another thread may have brought it meanwhile.
            if kept and self._index.get(key) is None:
                self._index.add(key, parent, slot, 0, 0)
                self._count(bytes_written=self._slot_bytes)
            else:
                self._index.give_slot(slot)
                self._count(dropped=not kept)
            self._changed([key] if kept else [], [victim.key] if victim is not None else [])
        return True

    def contains(self, key: bytes) -> bool:
        with self._lock:
            return self._index.get(key) is not None

    def leading(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            return len(self._index.leading(keys))

    def get(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> int:
        with self._lock:
            if self._closed:
                return 0
            entries = self._index.leading(keys[: len(views)])
            self._index.hold(entries)
        for entry, view in zip(entries, views, strict=False):
            view[: self._slot_bytes] = self._view(entry.slot)
        with self._lock:
            self._index.touch(entries)
            self._index.release(entries)
            self._count(hits=len(entries), bytes_read=len(entries) * self._slot_bytes)
        return len(entries)

    def flush(self) -> None:
        """`put` has carried it out."""

    def counts(self) -> TierCounts:
        with self._lock:
            return replace(self._counts, blocks=len(self._index), evicted=self._index.evicted)

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def _view(self, slot: int) -> memoryview:
        return self._bytes[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]

    def _count(self, **more: int) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})
