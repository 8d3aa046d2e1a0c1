"""What the kvstore asks of a tier, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class TierError(Exception):
    """The tier cannot start; one sentence with the setting to change. The node serves without it."""


@dataclass(frozen=True)
class TierCounts:
    """Since the start. `blocks`: held now; `hits`: blocks read and right; `torn`: blocks that failed their checksum;

    `dropped`: puts that were not carried out (no room in the queue, or the bytes changed meanwhile); `errors`: failed
    reads and writes; `bytes_written`, `bytes_read`: of blocks, without headers; `evicted`: blocks that gave way.
    """

    blocks: int = 0
    hits: int = 0
    torn: int = 0
    dropped: int = 0
    errors: int = 0
    evicted: int = 0
    bytes_written: int = 0
    bytes_read: int = 0


def unchanged() -> bool:
    """For views that nobody else writes."""
    return True


@dataclass(frozen=True)
class Job:
    """A block to be kept: what `put` was given, waiting for the tier's thread."""

    key: bytes
    parent: bytes
    view: memoryview
    still: Callable[[], bool]


class Tier(Protocol):
    """Safe to call from several threads. Never raises because of what lies below it: that is a miss, and counted."""

    def put(self, key: bytes, parent: bytes, view: memoryview, still: Callable[[], bool] = unchanged) -> bool:
        """Keep this block; returns at once, the bytes are read later on the tier's own thread.

        `view` is one block of slot_bytes. `still` is called on that thread once the bytes were read, and says whether
        they were still the block's (the slot's generation is the same); if not, nothing is kept. False when the tier
        takes no more for now; True also when it has the block. A block may come before its parent. Raises ValueError
        on a view of another size.
        """

    def contains(self, key: bytes) -> bool:
        """The tier keeps this block, as far as is known here."""

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many leading keys of the chain are here, as far as is known: only `get` proves it.

        At once in the disk tier; the remote tier asks its server.
        """

    def get(self, keys: Sequence[bytes], views: Sequence[memoryview]) -> int:
        """Read leading blocks into writable views; how many are there and right. May block: not for an event loop.

        Views behind that number may hold anything: their slots must not be sealed.
        """

    def flush(self) -> None:
        """Wait until all that was accepted is kept or dropped."""

    def counts(self) -> TierCounts: ...

    def close(self) -> None:
        """Carry out what was accepted, then let go; no view is read afterwards."""
