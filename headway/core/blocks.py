"""The prefix cache: sealed blocks by key, who holds them, and which goes first when slots are short."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Block:
    """A sealed block. `holds`: leases that use it; `children`: sealed blocks that continue it."""

    key: bytes
    slot: int
    parent: Block | None
    children: int = 0
    holds: int = 0
    last_use: int = 0


class BlockCache:
    """Evicts the least recently used leaf that no lease holds (leaf first, so residence stays prefix-closed).

    A lease holds a prefix from the root, so a parent has at least its child's holds, and every idle block can be
    evicted, leaves first. The heap is lazy: entries that are no longer true are skipped.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, Block] = {}
        self._leaves: list[tuple[int, int, Block]] = []
        self._clock = 0
        self._offers = 0
        self.idle = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        """Parents before children: a parent is always older, as it cannot leave before its children."""
        return iter(self._blocks.values())

    def get(self, key: bytes) -> Block | None:
        return self._blocks.get(key)

    def match(self, keys: Sequence[bytes], most: int) -> list[Block]:
        """The leading blocks of the chain that are here, at most `most`."""
        found: list[Block] = []
        for key in keys[:most]:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, key: bytes, slot: int, parent: Block | None) -> Block:
        """A newly sealed block, held once by whoever sealed it."""
        block = self._blocks[key] = Block(key, slot, parent, holds=1)
        if parent is not None:
            parent.children += 1
        return block

    def hold(self, block: Block) -> None:
        if not block.holds:
            self.idle -= 1
        block.holds += 1

    def drop(self, blocks: Sequence[Block]) -> None:
        """One hold less on each block of a prefix."""
        self._clock += 1
        for block in blocks:
            block.holds -= 1
            block.last_use = self._clock
            if not block.holds:
                self.idle += 1
        for block in reversed(blocks):
            self._offer(block)

    def evict(self) -> Block | None:
        """Take out the least recently used idle leaf; None when every block is held."""
        while self._leaves:
            last_use, _, block = heapq.heappop(self._leaves)
            if block.holds or block.children or block.last_use != last_use or self._blocks.get(block.key) is not block:
                continue
            del self._blocks[block.key]
            self.idle -= 1
            if block.parent is not None:
                block.parent.children -= 1
                self._offer(block.parent)
            return block
        return None

    def _offer(self, block: Block) -> None:
        if not block.holds and not block.children:
            self._offers += 1
            heapq.heappush(self._leaves, (block.last_use, self._offers, block))
            if len(self._leaves) > 2 * len(self._blocks) + 64:
                self._tidy()

    def _tidy(self) -> None:
        """Throw out heap entries that are no longer true, so that the heap stays as small as the cache."""
        true = {
            block.key: (last_use, offer, block)
            for last_use, offer, block in self._leaves
            if not block.holds
            and not block.children
            and block.last_use == last_use
            and self._blocks.get(block.key) is block
        }
        self._leaves = list(true.values())
        heapq.heapify(self._leaves)
