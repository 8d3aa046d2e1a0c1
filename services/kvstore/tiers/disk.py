"""The disk tier: blocks in one preallocated file, written off the request path and checked at every read."""

from __future__ import annotations

import contextlib
import logging
import mmap
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from services.kvstore.tiers.contract import Job, TierCounts, TierError, unchanged
from services.kvstore.tiers.file import BlockFile
from services.kvstore.tiers.index import Entry, rebuild
from services.kvstore.tiers.layout import Header, Layout, body_checksum

log = logging.getLogger(__name__)

# Failed writes in a row after which the tier takes no more: the disk is gone, and each try costs time.
MOST_FAILURES = 3
CLOSE_S = 10.0

Changed = Callable[[list[bytes], list[bytes]], None]


def ignore(stored: list[bytes], removed: list[bytes]) -> None:
    """For callers that do not follow what the tier holds."""


class DiskTier:
    """See `contract.Tier`. A torn block is never served: the header is cleared first and written last, and the body's
    checksum is verified at each read, so that neither kill -9 nor a power cut can give wrong bytes.

    `changed(stored, removed)` is called on the tier's threads and under its lock, so that what it tells is in order: it
    must only pass the news on.
    """

    def __init__(self, file: BlockFile, changed: Changed = ignore, queue_blocks: int = 256) -> None:
        self._file, self._changed = file, changed
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._readers = 0
        self._index, self._generation = rebuild(file.layout.slots, file.headers())
        self._counts = TierCounts()
        self._pending: set[bytes] = set()
        self._queue: queue.Queue[Job | None] = queue.Queue(queue_blocks)
        self._closed = False
        self._failures = 0
        self._scratch = memoryview(mmap.mmap(-1, file.layout.stride))
        self._writer = threading.Thread(target=self._write_all, name="disk-tier", daemon=True)
        self._writer.start()

    @staticmethod
    def open(
        path: Path, capacity_bytes: int, slot_bytes: int, format_digest: bytes, changed: Changed = ignore
    ) -> DiskTier:
        """Blocks of `slot_bytes` in a file of at most `capacity_bytes`; blocks of the same KV format are found again.

        A file of another format, size or version is started over. Raises TierError when it cannot be had.
        """
        layout = Layout.fitting(capacity_bytes, slot_bytes, format_digest)
        if not layout.slots:
            message = (
                f"disk_bytes is {capacity_bytes}; one block takes {layout.stride} bytes and its headers: enlarge it"
            )
            raise TierError(message)
        tier = DiskTier(BlockFile(path, layout), changed)
        log.info(
            "event=disk_tier path=%s slots=%d blocks=%d direct=%s fresh=%s",
            path, layout.slots, len(tier._index), tier.direct, tier._file.fresh,
        )  # fmt: skip
        return tier

    @property
    def direct(self) -> bool:
        """Whether bodies go around the page cache."""
        return self._file.direct

    # ------------------------------------------------------------------ what the kvstore calls

    def put(self, key: bytes, parent: bytes, view: memoryview, still: Callable[[], bool] = unchanged) -> bool:
        if len(view) != self._file.layout.slot_bytes:
            raise ValueError(f"a block here is {self._file.layout.slot_bytes} bytes; this view has {len(view)}")
        with self._lock:
            if self._closed or self._failures >= MOST_FAILURES:
                return False
            entry = self._index.get(key)
            if entry is not None:
                self._index.touch([entry])
                return True
            if key in self._pending:
                return True
            try:
                self._queue.put_nowait(Job(key, parent, view, still))
            except queue.Full:
                self._count(dropped=1)
                return False
            self._pending.add(key)
            return True

    def contains(self, key: bytes) -> bool:
        with self._lock:
            return self._index.get(key) is not None

    def leading(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            return len(self._index.leading(keys))

    def keys(self) -> list[bytes]:
        """All blocks held, oldest first; a parent may come after its child, or not at all."""
        with self._lock:
            return [entry.key for entry in self._index]

    def get(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> int:
        with self._lock:
            if self._closed:
                return 0
            entries = self._index.leading(keys[: len(views)])
            self._index.hold(entries)
            self._readers += 1
        good = 0
        try:
            for entry, view in zip(entries, views, strict=False):
                if not self._read(entry, view):
                    break
                good += 1
        finally:
            with self._lock:
                self._index.touch(entries[:good])
                self._index.release(entries)
                self._readers -= 1
                self._idle.notify_all()
                self._count(hits=good, bytes_read=good * self._file.layout.slot_bytes)
        return good

    def counts(self) -> TierCounts:
        with self._lock:
            return replace(self._counts, blocks=len(self._index), evicted=self._index.evicted)

    def flush(self) -> None:
        """Wait until all that was accepted is written or dropped."""
        self._queue.join()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_S)
            self._writer.join(CLOSE_S)
        with self._lock:
            idle = self._idle.wait_for(lambda: not self._readers, CLOSE_S) and not self._writer.is_alive()
        if idle:
            self._file.close()
        else:
            # The descriptors must not become another file's while somebody still uses them.
            log.error("event=disk_tier_stuck the disk did not answer within %.0f s; its file stays open", CLOSE_S)

    # ------------------------------------------------------------------ reading

    def _read(self, entry: Entry, view: memoryview) -> bool:
        """On the caller's thread; the entry is held, so nobody writes into its slot."""
        length = self._file.layout.slot_bytes
        try:
            self._file.read_body(entry.slot, view)
        except OSError as error:
            log.warning("event=disk_tier_read_failed slot=%d %s", entry.slot, error)
            self._forget(entry, errors=1)
            return False
        if body_checksum(view[:length]) != entry.checksum:
            log.warning("event=disk_tier_torn slot=%d key=%s", entry.slot, entry.key.hex())
            self._forget(entry, torn=1)
            return False
        return True

    def _forget(self, entry: Entry, **counts: int) -> None:
        with self._lock:
            removed = self._index.remove(entry)
            self._count(**counts)
            if removed:
                self._changed([], [entry.key])

    # ------------------------------------------------------------------ writing

    def _write_all(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._write(job)
            except Exception:
                # A view that was let go, or a caller's callback: not a reason to end the tier.
                log.exception("event=disk_tier_put_failed key=%s", job.key.hex())
                with self._lock:
                    self._count(errors=1)
            finally:
                with self._lock:
                    self._pending.discard(job.key)
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, job: Job) -> None:
        length = self._file.layout.slot_bytes
        # numpy copies without the interpreter lock, and stable bytes are what checksum and disk must agree on.
        np.copyto(np.frombuffer(self._scratch, np.uint8)[:length], np.frombuffer(job.view, np.uint8))
        still = job.still()
        with self._lock:
            taken = self._index.take_slot() if still else None
            if taken is None:
                self._count(dropped=1)
                return
            slot, victim = taken
            self._generation += 1
            header = Header(job.key, job.parent, self._generation, length, 0)
            if victim is not None:
                self._changed([], [victim.key])
        self._commit(slot, header)

    def _commit(self, slot: int, header: Header) -> None:
        """No header, then the body, then its header: killed at any point, the slot holds a whole block or none."""
        length = header.length
        header = replace(header, checksum=body_checksum(self._scratch[:length]))
        try:
            self._file.write_header(slot, None)
            self._file.write_body(slot, self._scratch)
            self._file.write_header(slot, header)
        except OSError as error:
            self._failed(slot, error)
            return
        with self._lock:
            self._failures = 0
            self._index.add(header.key, header.parent, slot, header.generation, header.checksum)
            self._count(bytes_written=length)
            self._changed([header.key], [])

    def _failed(self, slot: int, error: OSError) -> None:
        with self._lock:
            self._index.give_slot(slot)
            self._count(errors=1)
            self._failures += 1
            off = self._failures == MOST_FAILURES
        log.warning("event=disk_tier_write_failed slot=%d %s", slot, error)
        if off:
            log.error("event=disk_tier_off %d writes failed in a row; check the disk and restart", MOST_FAILURES)

    def _count(self, **more: int) -> None:
        """Under the lock."""
        counts = self._counts
        self._counts = replace(counts, **{name: getattr(counts, name) + by for name, by in more.items()})
