"""Eviction policies that `bench.evict` compares with the one in use; each keeps to candidates, as `core.evict` says.

Where a paper's queue would meet a block that cannot go (held, or continued by a resident block), the block is passed
over; it keeps its place, so it is met first once it can go.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence

from headway.core.evict import Candidates, Resident


class Base:
    """One queue of candidates by rank; subclasses say the rank."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.queue = Candidates()

    def used(self, blocks: Sequence[Resident]) -> None:
        pass

    def rank(self, block: Resident) -> int:
        return block.last_use

    def offer(self, block: Resident) -> None:
        self.queue.offer(block, self.rank(block))

    def withdraw(self, block: Resident) -> None:
        self.queue.withdraw(block)

    def take(self) -> Resident | None:
        return self.queue.take()


class Ghosts:
    """Keys of the last blocks that went, at most `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: bytes) -> None:
        self._keys[key] = None
        while len(self._keys) > self.most:
            self._keys.popitem(last=False)

    def drop_oldest(self) -> None:
        if self._keys:
            self._keys.popitem(last=False)

    def forgive(self, key: bytes) -> bool:
        """Whether the key was among them; it is not any more."""
        return self._keys.pop(key, True) is None


class Lru(Base):
    """The least recently used block goes."""


class Fifo(Base):
    """The block that came first goes: the floor of the comparison."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._came: dict[Resident, int] = {}
        self._count = 0

    def used(self, blocks: Sequence[Resident]) -> None:
        for block in blocks:
            self._count += block not in self._came
            self._came.setdefault(block, self._count)

    def rank(self, block: Resident) -> int:
        return self._came[block]

    def take(self) -> Resident | None:
        block = self.queue.take()
        if block is not None:
            del self._came[block]
        return block


class TwoClasses(ABC):
    """Blocks used once and blocks used often, each least recently used first; a returning ghost counts as used often.

    `once` and `often` count all resident blocks of a class, not only its candidates.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.members: dict[Resident, bool] = {}
        self.counts = {False: 0, True: 0}
        self.queues = {False: Candidates(), True: Candidates()}

    @abstractmethod
    def returns(self, block: Resident) -> bool:
        """Whether the block was here before and is remembered."""

    @abstractmethod
    def prefer_once(self) -> bool:
        """Whether the next to go is a block used once."""

    @abstractmethod
    def went(self, block: Resident, *, often: bool) -> None:
        """The block is gone; `often` says which class it was of."""

    def used(self, blocks: Sequence[Resident]) -> None:
        for block in blocks:
            if block not in self.members:
                often = self.members[block] = self.returns(block)
                self.counts[often] += 1
            elif block.uses > 1 and not self.members[block]:
                self.members[block] = True
                self.counts[False] -= 1
                self.counts[True] += 1
                self.queues[False].withdraw(block)

    def offer(self, block: Resident) -> None:
        self.queues[self.members[block]].offer(block, block.last_use)

    def withdraw(self, block: Resident) -> None:
        self.queues[self.members[block]].withdraw(block)

    def take(self) -> Resident | None:
        often = not self.prefer_once()
        block = self.queues[often].take() or self.queues[not often].take()
        if block is not None:
            often = self.members.pop(block)
            self.counts[often] -= 1
            self.went(block, often=often)
        return block


class TwoQueues(TwoClasses):
    """2Q (Johnson and Shasha, VLDB 1994): a quarter for blocks used once, ghosts of them worth half the capacity."""

    def __init__(self, capacity: int, share: float = 0.25, ghosts: float = 0.5) -> None:
        super().__init__(capacity)
        self._room = max(1, int(capacity * share))
        self._ghosts = Ghosts(max(1, int(capacity * ghosts)))

    def returns(self, block: Resident) -> bool:
        return self._ghosts.forgive(block.key)

    def prefer_once(self) -> bool:
        return self.counts[False] > self._room

    def went(self, block: Resident, *, often: bool) -> None:
        if not often:
            self._ghosts.add(block.key)


class Arc(TwoClasses):
    """ARC (Megiddo and Modha, FAST 2003): the share of blocks used once follows which ghosts come back."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._target = 0.0
        self._ghosts = {False: Ghosts(capacity), True: Ghosts(capacity)}

    def returns(self, block: Resident) -> bool:
        once, often = self._ghosts[False], self._ghosts[True]
        if once.forgive(block.key):
            self._target = min(self.capacity, self._target + max(1.0, len(often) / (len(once) + 1)))
            return True
        if often.forgive(block.key):
            self._target = max(0.0, self._target - max(1.0, len(once) / (len(often) + 1)))
            return True
        return False

    def prefer_once(self) -> bool:
        return self.counts[False] > self._target

    def went(self, block: Resident, *, often: bool) -> None:
        self._ghosts[often].add(block.key)
        while self.counts[False] + len(self._ghosts[False]) > self.capacity and len(self._ghosts[False]):
            self._ghosts[False].drop_oldest()
        while sum(self.counts.values()) + len(self._ghosts[False]) + len(self._ghosts[True]) > 2 * self.capacity:
            self._ghosts[True].drop_oldest()


class S3Fifo:
    """S3-FIFO (Yang et al., SOSP 2023): a small queue of a tenth, a main queue, ghosts of as many as main holds."""

    def __init__(self, capacity: int) -> None:
        self._small_room = max(1, capacity // 10)
        self._ghosts = Ghosts(capacity - self._small_room)
        self._queues = {False: Candidates(), True: Candidates()}
        self._main: dict[Resident, bool] = {}
        self._place: dict[Resident, int] = {}
        self._freq: dict[Resident, int] = {}
        self._small = 0
        self._count = 0

    def _append(self, block: Resident, *, main: bool) -> None:
        self._count += 1
        self._main[block], self._place[block] = main, self._count

    def used(self, blocks: Sequence[Resident]) -> None:
        for block in blocks:
            if block not in self._freq:
                main = self._ghosts.forgive(block.key)
                self._append(block, main=main)
                self._freq[block] = 0
                self._small += not main
            else:
                self._freq[block] = min(3, self._freq[block] + 1)

    def offer(self, block: Resident) -> None:
        self._queues[self._main[block]].offer(block, self._place[block])

    def withdraw(self, block: Resident) -> None:
        self._queues[self._main[block]].withdraw(block)

    def take(self) -> Resident | None:
        while self._queues[False] or self._queues[True]:
            from_main = not (self._small > self._small_room and self._queues[False]) and bool(self._queues[True])
            block = self._queues[from_main].take()
            assert block is not None
            if self._freq[block] > (0 if from_main else 1):
                self._freq[block] = self._freq[block] - 1 if from_main else 0
                self._small -= not from_main
                self._append(block, main=True)
                self.offer(block)
                continue
            return self._gone(block, main=from_main)
        return None

    def _gone(self, block: Resident, *, main: bool) -> Resident:
        if not main:
            self._small -= 1
            self._ghosts.add(block.key)
        del self._main[block], self._place[block], self._freq[block]
        return block


class Sieve:
    """SIEVE (Zhang et al., NSDI 2024): a hand passes from old to new, spares once what was used since, takes the rest.

    A chain's children are placed before their parents, so that the hand meets a leaf and then what it continued.
    """

    def __init__(self, capacity: int) -> None:
        self._ahead, self._behind = Candidates(), Candidates()
        self._place: dict[Resident, int] = {}
        self._spared_at: dict[Resident, int] = {}
        self._hand = self._count = 0

    def used(self, blocks: Sequence[Resident]) -> None:
        for block in reversed(blocks):
            if block not in self._place:
                self._count += 1
                self._place[block] = self._count
                self._spared_at[block] = block.uses

    def offer(self, block: Resident) -> None:
        self.withdraw(block)
        ahead = self._place[block] > self._hand
        (self._ahead if ahead else self._behind).offer(block, self._place[block])

    def withdraw(self, block: Resident) -> None:
        self._ahead.withdraw(block)
        self._behind.withdraw(block)

    def take(self) -> Resident | None:
        while self._ahead or self._behind:
            block = self._ahead.take()
            if block is None:
                self._ahead, self._behind, self._hand = self._behind, self._ahead, 0
                continue
            self._hand = self._place[block]
            if block.uses == self._spared_at[block]:
                del self._place[block], self._spared_at[block]
                return block
            self._spared_at[block] = block.uses
            self._behind.offer(block, self._place[block])
        return None


class Belady(Base):
    """The block whose next use is furthest away goes (Belady, 1966): needs the future, so it is the ceiling."""

    def __init__(self, capacity: int, next_use: Callable[[bytes], int]) -> None:
        super().__init__(capacity)
        self._next_use = next_use

    def rank(self, block: Resident) -> int:
        return -self._next_use(block.key)
