"""The prefix cache: sealed blocks by key, who holds them, and which goes first when slots are short."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headway.core.evict import AgedLfu, Foreseeable, Policy, Resident
from headway.core.records import Records


@dataclass(slots=True, eq=False)
class Block(Resident):
    """A sealed block. `holds`: leases that use it; `children`: sealed blocks that continue it."""

    slot: int = 0
    parent: Block | None = None
    children: int = 0
    holds: int = 0


class BlockCache:
    """Evicts leaves that no lease holds, in the order of a policy (leaf first, so residence stays prefix-closed).

    A lease holds a prefix from the root, so a parent has at least its child's holds, and every idle block can be
    evicted, leaves first.
    """

    def __init__(self, policy: Policy | None = None, records: Records | None = None) -> None:
        self._records = records
        self._blocks: dict[bytes, Block] = {}
        self._policy: Policy = policy or AgedLfu()
        self._clock = 0
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
        block = self._blocks[key] = Block(key, slot=slot, parent=parent, holds=1)
        if parent is not None:
            parent.children += 1
        if self._records is not None:
            self._records.seal(slot, key, parent.slot if parent is not None else None)
        return block

    def hold(self, block: Block) -> None:
        if not block.holds:
            self.idle -= 1
            if not block.children:
                self._policy.withdraw(block)
        block.holds += 1

    def drop(self, blocks: Sequence[Block]) -> None:
        """One hold less on each block of a prefix."""
        self._clock += 1
        for block in blocks:
            block.holds -= 1
            block.uses += 1
            block.last_use = self._clock
            if not block.holds:
                self.idle += 1
        self._policy.used(blocks)
        for block in reversed(blocks):
            self._offer(block)

    def next_out(self) -> Iterator[Block]:
        """Idle blocks in the order in which `evict` would take them, if nothing were used meanwhile.

        Ends with any change; O(k log k) for the first k. Raises TypeError with a policy that cannot tell.
        """
        policy = self._policy
        if not isinstance(policy, Foreseeable):
            raise TypeError(f"{type(policy).__name__} does not tell who goes next")
        leaves = (self._blocks[leaf.key] for leaf in policy.in_order())
        leaf = next(leaves, None)
        # Parents all of whose children would be gone by then, and how many of the others' would.
        bare: list[tuple[int, int, Block]] = []
        gone: Counter[Block] = Counter()
        for number in itertools.count():
            if leaf is not None and (not bare or policy.order(leaf) <= bare[0][0]):
                block, leaf = leaf, next(leaves, None)
            elif bare:
                block = heapq.heappop(bare)[2]
            else:
                return
            yield block
            parent = block.parent
            if parent is not None:
                gone[parent] += 1
                if not parent.holds and gone[parent] == parent.children:
                    heapq.heappush(bare, (policy.order(parent), number, parent))

    def evict(self) -> Block | None:
        """Take out the idle leaf that the policy names; None when every block is held."""
        victim = self._policy.take()
        if victim is None:
            return None
        block = self._blocks.pop(victim.key)
        self.idle -= 1
        if block.parent is not None:
            block.parent.children -= 1
            self._offer(block.parent)
        return block

    def _offer(self, block: Block) -> None:
        if not block.holds and not block.children:
            self._policy.offer(block)
