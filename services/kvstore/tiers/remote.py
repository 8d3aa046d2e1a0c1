"""The remote tier: blocks in a Valkey or Redis server that nodes share, behind time limits and checksums.

What bounds the server's memory is the server's own business (`maxmemory` with an LRU or LFU policy), and `ttl_s`.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from typing import Any, TypeVar

import numpy as np

from services.kvstore.tiers.contract import Job, TierCounts, unchanged
from services.kvstore.tiers.link import Link, LinkOptions
from services.kvstore.tiers.value import HEADER_BYTES, fill_header, opens_as

log = logging.getLogger(__name__)

# One batch is one answer's wait for whoever comes next on the connection.
BATCH_BYTES = 4 << 20
BATCH_KEYS = 512
QUEUE_BLOCKS = 64
SENT_KEPT = 1 << 16
TTL_S = 24 * 3600

T = TypeVar("T")


class RemoteTier:
    """See `contract.Tier`. While the server is down, the answer is "nothing", at once, and puts are refused.

    A value that is not the whole block of its key is not served, and deleted. Blocks that nobody puts again within
    `ttl_s` seconds leave the server.
    """

    def __init__(self, link: Link, slot_bytes: int, format_digest: bytes, poll_s: float, ttl_s: int = TTL_S) -> None:
        self._link, self._slot_bytes, self._poll_s, self._ttl_s = link, slot_bytes, poll_s, ttl_s
        self._prefix = b"headway:" + format_digest.hex().encode() + b":"
        self._batch = max(1, BATCH_BYTES // slot_bytes)
        self._lock = threading.Lock()
        self._counts = TierCounts()
        self._pending: set[bytes] = set()
        # What the server took lately, and when.
        self._sent: OrderedDict[bytes, float] = OrderedDict()
        self._queue: queue.Queue[Job | None] = queue.Queue(QUEUE_BLOCKS)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="remote-tier", daemon=True)
        self._thread.start()

    @staticmethod
    def open(
        url: str, slot_bytes: int, format_digest: bytes, options: LinkOptions | None = None, ttl_s: int = TTL_S
    ) -> RemoteTier:
        """`url`: redis://[[user]:password@]host:port[/db], rediss:// for TLS, unix://path. The server may come later.

        Raises TierError when the client library is missing or the address is none.
        """
        options = options or LinkOptions()
        return RemoteTier(Link(url, options), slot_bytes, format_digest, options.first_retry_s, ttl_s)

    @property
    def up(self) -> bool:
        """Whether the server answered last time."""
        return self._link.up

    # ------------------------------------------------------------------ what the kvstore calls

    def put(self, key: bytes, parent: bytes, view: memoryview, still: Callable[[], bool] = unchanged) -> bool:
        if len(view) != self._slot_bytes:
            raise ValueError(f"a block here is {self._slot_bytes} bytes; this view has {len(view)}")
        with self._lock:
            if self._closed or not self._link.up:
                return False
            if key in self._pending:
                return True
            try:
                self._queue.put_nowait(Job(key, parent, view, still))
            except queue.Full:
                self._count_locked(dropped=1)
                return False
            self._pending.add(key)
            return True

    def contains(self, key: bytes) -> bool:
        """It was put lately, and the server did not go down since: it may have evicted it."""
        with self._lock:
            if not self._link.up:
                self._sent.clear()
            return time.monotonic() - self._sent.get(key, -math.inf) < self._ttl_s / 2

    def leading(self, keys: Sequence[bytes]) -> int:
        """Asks the server, so like `get` not for an event loop."""
        found = 0
        for batch in _batches(keys, BATCH_KEYS):
            present: list[bool] = self._link.ask(partial(self._present, keys=batch), [])
            here = sum(1 for _ in takewhile(bool, present))
            found += here
            if here < len(batch):
                break
        return found

    def get(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> int:
        good = 0
        for batch in _batches(list(zip(keys, views, strict=False)), self._batch):
            values: list[bytes | None] = self._link.ask(partial(self._values, keys=[key for key, _ in batch]), [])
            taken = takewhile(bool, (self._take(*pair, value) for pair, value in zip(batch, values, strict=False)))
            here = sum(1 for _ in taken)
            good += here
            if here < len(batch):
                break
        if good:
            self._link.served()
        self._count(hits=good, bytes_read=good * self._slot_bytes)
        return good

    def counts(self) -> TierCounts:
        """`blocks` and `evicted` stay 0: the server is shared, nobody here knows what it holds."""
        with self._lock:
            return replace(self._counts, errors=self._counts.errors + self._link.errors)

    def flush(self) -> None:
        """Wait until all that was accepted is sent or dropped."""
        self._queue.join()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        # The thread empties the queue within a few time limits, whether the server answers or not.
        self._queue.put(None)
        self._thread.join()
        self._link.close()

    # ------------------------------------------------------------------ reading

    def _name(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    def _present(self, client: Any, keys: Sequence[bytes]) -> list[bool]:
        pipe = client.pipeline(transaction=False)
        for key in keys:
            pipe.exists(self._name(key))
        return [bool(count) for count in pipe.execute()]

    def _values(self, client: Any, keys: Sequence[bytes]) -> list[bytes | None]:
        return list(client.mget([self._name(key) for key in keys]))

    def _take(self, key: bytes, view: memoryview, value: bytes | None) -> bool:
        """Copy a value that is right into the view."""
        if value is None:
            return False
        if not opens_as(key, self._slot_bytes, value):
            log.warning("event=remote_tier_torn key=%s", key.hex())
            self._count(torn=1)
            self._link.ask(lambda client: client.delete(self._name(key)), 0)
            return False
        target = np.frombuffer(view, np.uint8)[: self._slot_bytes]
        np.copyto(target, np.frombuffer(value, np.uint8, offset=HEADER_BYTES))
        return True

    # ------------------------------------------------------------------ the background thread

    def _run(self) -> None:
        while True:
            self._link.probe()
            try:
                # Readers may find the server gone while nothing is put: look after that many seconds.
                jobs = [self._queue.get(timeout=self._poll_s)]
            except queue.Empty:
                continue
            jobs += self._more()
            self._send([job for job in jobs if job is not None])
            for _ in jobs:
                self._queue.task_done()
            if None in jobs:
                return

    def _more(self) -> Iterator[Job | None]:
        """What else is waiting, up to a batch."""
        for _ in range(self._batch - 1):
            try:
                yield self._queue.get_nowait()
            except queue.Empty:
                return

    def _send(self, jobs: list[Job]) -> None:
        values = [(job.key, value) for job in jobs if (value := self._value(job)) is not None]
        sent = self._link.ask(lambda client: self._set(client, values), 0) if values else 0
        with self._lock:
            self._pending.difference_update(job.key for job in jobs)
            self._count_locked(dropped=len(jobs) - sent, bytes_written=sent * self._slot_bytes)

    def _value(self, job: Job) -> bytearray | None:
        """Header and bytes; None when the bytes are no longer the block's, or cannot be had."""
        value = bytearray(HEADER_BYTES + self._slot_bytes)
        try:
            np.copyto(np.frombuffer(value, np.uint8, offset=HEADER_BYTES), np.frombuffer(job.view, np.uint8))
            if not job.still():
                return None
        except Exception:
            # A view that was let go, or a caller's callback: not a reason to end the tier.
            log.exception("event=remote_tier_put_failed key=%s", job.key.hex())
            self._count(errors=1)
            return None
        fill_header(value, job.key, job.parent)
        return value

    def _set(self, client: Any, values: list[tuple[bytes, bytearray]]) -> int:
        """How many the server took. SET and not MSET, which knows no expiry; pipelined, the cost is the same."""
        pipe = client.pipeline(transaction=False)
        for key, value in values:
            pipe.set(self._name(key), memoryview(value), ex=self._ttl_s)
        answers = pipe.execute(raise_on_error=False)
        for (key, _), answer in zip(values, answers, strict=True):
            if answer is True:
                self._link.served()
                self._note_sent(key)
            else:
                self._link.refused(answer)
        return sum(answer is True for answer in answers)

    def _note_sent(self, key: bytes) -> None:
        with self._lock:
            self._sent[key] = time.monotonic()
            self._sent.move_to_end(key)
            if len(self._sent) > SENT_KEPT:
                self._sent.popitem(last=False)

    def _count(self, **more: int) -> None:
        with self._lock:
            self._count_locked(**more)

    def _count_locked(self, **more: int) -> None:
        counts = self._counts
        self._counts = replace(counts, **{name: getattr(counts, name) + by for name, by in more.items()})


def _batches(items: Sequence[T], most: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, most)):
        yield batch
