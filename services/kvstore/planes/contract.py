"""What a plane is to the store that reads: blocks from a peer's slots into own ones."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import xxhash


class Move(NamedTuple):
    """One block: from the peer's slot, as long as that has this generation, into the own slot."""

    source: int
    generation: int
    slot: int


class Copied(enum.Enum):
    """What became of a move."""

    GOOD = "exactly what was sealed"
    STALE = "the source slot was given out anew"
    CORRUPT = "the checksum did not fit"
    MISSING = "the plane broke before it was there"


# Of one request: large enough that its costs vanish, small enough that what is urgent soon gets its turn.
REQUEST_BYTES = 8 << 20
# Smaller goes first: (0 for a waiting request, 1 for a speculative copy; arrival in Unix seconds).
Urgency = tuple[int, float]


class PlaneError(Exception):
    """The plane cannot be opened; one sentence."""


def request_blocks(slot_bytes: int) -> int:
    """How many blocks are best asked for at once."""
    return max(1, REQUEST_BYTES // slot_bytes)


class Checksums:
    """Which requests carry checksums: "off" none, "sampled" one in 64, "all" each."""

    def __init__(self, mode: str) -> None:
        self._every = {"off": 0, "sampled": 64, "all": 1}[mode]
        self._count = itertools.count()

    def wanted(self) -> bool:
        return bool(self._every) and next(self._count) % self._every == 0


def digests(views: Sequence[memoryview]) -> list[int]:
    """xxh3_64 of each."""
    return [xxhash.xxh3_64_intdigest(view) for view in views]


def verdict(view: memoryview, *, current: bool, checksum: int | None) -> Copied:
    """Of a block whose bytes have arrived; `checksum` is the source's xxh3_64, None when none was asked for."""
    return judge(None if checksum is None else digests([view])[0], current=current, checksum=checksum)


def judge(found: int | None, *, current: bool, checksum: int | None) -> Copied:
    """As `verdict`, of a block whose bytes had this xxh3_64 when they arrived; None when no checksum was asked for."""
    if not current:
        return Copied.STALE
    return Copied.GOOD if found is None or found == checksum else Copied.CORRUPT


async def all_over(futures: Sequence[asyncio.Future[Any]]) -> None:
    """Wait until all are done. The caller's being cancelled, once or often, does not cut it short."""
    while pending := [future for future in futures if not future.done()]:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(pending)


class Plane(Protocol):
    """One way to move bytes from one peer."""

    name: str

    async def read(self, moves: Sequence[Move], urgency: Urgency) -> list[Copied]:
        """Copy blocks. When it has returned, or was cancelled, nothing is written to the slots any more.

        A block that is MISSING says that the plane is closed now.
        """
        ...

    def close(self) -> None: ...
