"""Which resident block goes first when room is short; the same policy serves the slab's prefix cache and the disk tier.

Only *candidates* can go: blocks that nobody holds and that no resident block continues, so that residence stays
prefix-closed whatever a policy prefers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

# More uses do not make a block stay longer: what was hot once must be able to leave.
MOST_USES = 16
# Room for the cache's clock below the rank.
CLOCK_BITS = 48


@dataclass(slots=True, eq=False)
class Resident:
    """What a policy may know of a block.

    `uses`: leases or reads of it that have ended; `last_use`: the cache's count of such ends at the last of them;
    `rank`: the policy's own.
    """

    key: bytes
    uses: int = 0
    last_use: int = 0
    rank: int = 0


class Policy(Protocol):
    """Says which candidate goes. Told of everything that happens to blocks; has no clock and no randomness."""

    def used(self, blocks: Sequence[Resident]) -> None:
        """A use of these blocks (of one chain, parents first) has ended; their counts are raised already.

        Of a block with `uses` 1 it is the first that the policy hears.
        """

    def offer(self, block: Resident) -> None:
        """The block is a candidate from now on; one that is a candidate already may have been used again."""

    def withdraw(self, block: Resident) -> None:
        """The block is no candidate any more; no error if it was none."""

    def take(self) -> Resident | None:
        """The candidate that goes: neither a candidate nor resident any more. None without candidates."""


@runtime_checkable
class Foreseeable(Policy, Protocol):
    """A policy that also tells who goes next, before it goes."""

    def order(self, block: Resident) -> int:
        """Of two candidates the one with the smaller number goes first."""

    def in_order(self) -> Iterator[Resident]:
        """The candidates as `take` would give them, if nothing were used meanwhile. Ends with any change."""


class Candidates:
    """Candidates ordered by a rank, the lowest first; among equals the one offered first. Lazy: O(log n) amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Resident]] = []
        self._true: dict[Resident, tuple[int, int, Resident]] = {}
        self._offers = 0

    def __len__(self) -> int:
        return len(self._true)

    def offer(self, block: Resident, rank: int) -> None:
        """The block is a candidate of this rank; a former rank of it is forgotten."""
        self._offers += 1
        entry = self._true[block] = (rank, self._offers, block)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._true) + 64:
            # Entries that are no longer true must not outgrow the cache.
            self._heap = list(self._true.values())
            heapq.heapify(self._heap)

    def withdraw(self, block: Resident) -> None:
        self._true.pop(block, None)

    def take(self) -> Resident | None:
        """The candidate of the lowest rank, which is none any more."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            block = entry[2]
            if self._true.get(block) is entry:
                del self._true[block]
                return block
        return None

    def in_order(self) -> Iterator[Resident]:
        """As `take` would give them; O(k log k) for the first k."""
        heap = self._heap
        ahead = [(heap[0], 0)] if heap else []
        while ahead:
            entry, at = heapq.heappop(ahead)
            if self._true.get(entry[2]) is entry:
                yield entry[2]
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(heap):
                    heapq.heappush(ahead, (heap[child], child))


class AgedLfu:
    """LFU with dynamic ageing (Arlitt et al., Performance Evaluation Review 1999), uses counted up to `MOST_USES`.

    rank = age + uses when it was last used, where age is the rank of the last block that went; among equals the least
    recently used goes. So blocks seen once do not push out one seen often, until its credit has aged away: with each
    turnover of the cache the age rises by about one. Chosen by replay of traces, see docs/tiers.md.
    """

    def __init__(self) -> None:
        self._candidates = Candidates()
        self._age = 0

    def used(self, blocks: Sequence[Resident]) -> None:
        once, most = self._age, self._age + MOST_USES
        for block in blocks:
            block.rank = once + block.uses if block.uses < MOST_USES else most

    def offer(self, block: Resident) -> None:
        self._candidates.offer(block, self.order(block))

    def withdraw(self, block: Resident) -> None:
        self._candidates.withdraw(block)

    def order(self, block: Resident) -> int:
        return (block.rank << CLOCK_BITS) + block.last_use

    def in_order(self) -> Iterator[Resident]:
        return self._candidates.in_order()

    def take(self) -> Resident | None:
        block = self._candidates.take()
        if block is not None:
            self._age = max(self._age, block.rank)
        return block
