"""Working copies: K and V of sequences that decode on a CPU, as attention reads them fastest.

V lies head by head in one piece, K transposed: a few rows times a matrix are fastest where the matrix is read along its
rows (8 contexts of 512 tokens, both products: 9 ms, against 12 of torch's fused attention over K as it comes).

The slab stays the truth: a step's K and V go to both. A copy is made from the slab before a sequence's first step here,
which takes about as long as attention over the slab takes in one step; without a copy it takes that long in every step.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from headway.engine.drafted import DraftedBatch
from headway.engine.pages import Pages
from headway.engine.together import Batch, Step, batches_of

# Tokens that the smallest copies have room for; larger ones have room for powers of two times as many.
LEAST_ROOM = 256
PAGE_BYTES = 4096
# Of the copies that lie in one piece of memory, so that they attend in one call.
SHELF_TOKENS = 8192
# By so many tokens at a time a growing copy is counted.
COUNTED = 64


class Shelf:
    """Copies with room for `room` tokens each. Of each layer, and of row r head h at r · kv_heads + h: keys [rows ·
    kv_heads, head_dim, room], values [rows · kv_heads, room, head_dim], one after the other in flat[layer].

    used: tokens of each row that some copy ever had; what was never used is zeros that lie nowhere. counted: tokens of
    each row, at least those, whose memory is accounted for.
    """

    def __init__(self, pages: Pages, room: int) -> None:
        """Raises OSError where the kernel gives no addresses."""
        self.room, self.heads, self.dim = room, pages.heads, pages.dim
        rows = max(1, SHELF_TOKENS // room)
        lines = rows * pages.heads
        half = lines * pages.dim * room
        self._memory = _untouched(len(pages.pairs) * 2 * half * pages.dtype.itemsize)
        self.flat = list(torch.frombuffer(self._memory, dtype=pages.dtype).view(-1, 2 * half))
        self.keys = [flat[:half].view(lines, pages.dim, room) for flat in self.flat]
        self.values = [flat[half:].view(lines, room, pages.dim) for flat in self.flat]
        self.free = list(reversed(range(rows)))
        self.used = [0] * rows
        self.counted = [0] * rows

    @property
    def idle(self) -> bool:
        return len(self.free) == len(self.used)

    @property
    def bytes(self) -> int:
        return sum(map(self.bytes_of, self.counted))

    def bytes_of(self, tokens: int) -> int:
        """Of memory, at most, that a row takes of which so many tokens are used. It comes by pages: a page of keys has
        one number of each of many tokens.
        """
        size, heads = self.flat[0].itemsize, self.heads
        keys = _touched(heads * self.dim, self.room * size, tokens * size)
        values = _touched(heads, self.room * self.dim * size, tokens * self.dim * size)
        return len(self.flat) * (keys + values)

    def release(self, row: int) -> int:
        """Give back the memory of a free row, which becomes zeros that lie nowhere. → how many bytes that were."""
        size = self.heads * self.dim * self.room * self.flat[0].itemsize
        if size % mmap.PAGESIZE:
            return 0  # it shares pages with its neighbours
        for piece in range(2 * len(self.flat)):
            self._memory.madvise(mmap.MADV_DONTNEED, (piece * len(self.used) + row) * size, size)
        freed = self.bytes_of(self.counted[row])
        self.used[row] = self.counted[row] = 0
        return freed

    def put_back(self, row: int) -> None:
        self.free.append(row)
        self.free.sort(reverse=True)


@dataclass(slots=True, eq=False)
class Copy:
    """A sequence's tokens [0, tokens) in a row of a shelf."""

    shelf: Shelf
    row: int
    tokens: int


def no_limit() -> int:
    return 1 << 62


@dataclass
class Copies:
    """Of one slab; never more than `most_bytes` of memory, nor than there is: `left` says what may be taken beside what
    is taken. A sequence whose copy would need more has none.
    """

    pages: Pages
    most_bytes: int
    left: Callable[[], int] = no_limit
    # By sequence, tokens that were copied since `clean`.
    made: dict[Hashable, int] = field(default_factory=dict)
    bytes: int = 0
    _by_sequence: dict[Hashable, Copy] = field(default_factory=dict)
    _shelves: list[Shelf] = field(default_factory=list)
    # Put there by another thread than the engine's.
    _ended: deque[Hashable] = field(default_factory=deque)
    # Of the last forward, and how many rows its pack had.
    _steps: list[Step] = field(default_factory=list)
    _batches: list[Batch | DraftedBatch] = field(default_factory=list)
    _rows: int = 0

    def forget(self, sequence: Hashable) -> None:
        """It does not decode here any more. From any thread."""
        self._ended.append(sequence)

    def clean(self) -> None:
        """Before a forward: take back the rows of what was forgotten."""
        self.made.clear()
        while self._ended:
            self._drop(self._ended.popleft())

    def step(
        self, sequence: Hashable | None, row: int, position: int, blocks: Callable[[], torch.Tensor], count: int = 1
    ) -> Step | None:
        """The step in which row `row` of the pack is the sequence's token at `position`, and those after it, `count` in
        all, are drafts. Its copy is made where there is none, and taken to get those tokens. None where the sequence
        has no name, or memory is out.

        blocks: int64, the slots of tokens [0, position + count); asked for where a copy is made.
        """
        if sequence is None:
            return None
        copy = self._by_sequence.get(sequence)
        # What the copy has at `position` and after it were drafts that did not hold, and is written over.
        if copy is None or copy.tokens < position or not self._grow(copy, position + count):
            self._drop(sequence)
            copy = self._take(position + count)
            if copy is None:
                return None
            self._by_sequence[sequence] = copy
            self._fill(copy, position, blocks())
            self.made[sequence] = position
        copy.tokens = position + count
        copy.shelf.used[copy.row] = max(copy.shelf.used[copy.row], copy.tokens)
        return Step(row, copy, position + count, count)

    def together(self, steps: list[Step], rows: int) -> list[Batch | DraftedBatch]:
        """The batches of a forward's steps, whose pack has so many `rows`; those of the last forward where the same
        sequences are one token further.
        """
        if rows == self._rows and len(steps) == len(self._steps) and all(map(_follows, steps, self._steps)):
            for batch in self._batches:
                assert isinstance(batch, Batch)
                batch.advance()
        else:
            self._batches = batches_of(steps, rows)
        self._steps, self._rows = steps, rows
        return self._batches

    def _drop(self, sequence: Hashable) -> None:
        copy = self._by_sequence.pop(sequence, None)
        if copy is not None:
            copy.shelf.put_back(copy.row)

    def _take(self, tokens: int) -> Copy | None:
        """A free row, of the first shelf that has one."""
        room = LEAST_ROOM
        while room < tokens:
            room *= 2
        shelf = next((shelf for shelf in self._shelves if shelf.room == room and shelf.free), None)
        if shelf is None:
            try:
                shelf = Shelf(self.pages, room)
            except OSError:
                return None
            self._shelves.append(shelf)
        copy = Copy(shelf, shelf.free.pop(), 0)
        if self._grow(copy, tokens):
            return copy
        shelf.put_back(copy.row)
        return None

    def _grow(self, copy: Copy, tokens: int) -> bool:
        """Whether its row may have so many tokens; if so, their memory is accounted for."""
        shelf, row = copy.shelf, copy.row
        if tokens <= shelf.counted[row]:
            return True
        if tokens > shelf.room:
            return False
        counted = min(shelf.room, -(-tokens // COUNTED) * COUNTED)
        more = shelf.bytes_of(counted) - shelf.bytes_of(shelf.counted[row])
        if not self._fits(more):
            return False
        shelf.counted[row] = counted
        self.bytes += more
        return True

    def _fits(self, more: int) -> bool:
        """Whether there may be so many bytes more. Rows that nobody has keep their memory, which is there at once when
        it is needed again; it goes where there would be too much.
        """
        if more <= min(self.most_bytes - self.bytes, self.left()):
            return True
        for shelf in self._shelves:
            self.bytes -= sum(shelf.release(row) for row in shelf.free if shelf.counted[row])
        for shelf in [shelf for shelf in self._shelves if shelf.idle]:
            self._shelves.remove(shelf)
            self.bytes -= shelf.bytes
            # These may hold it.
            self._steps, self._batches = [], []
        return more <= min(self.most_bytes - self.bytes, self.left())

    def _fill(self, copy: Copy, tokens: int, blocks: torch.Tensor) -> None:
        lines = slice(copy.row * self.pages.heads, (copy.row + 1) * self.pages.heads)
        stale = slice(tokens, copy.shelf.used[copy.row])
        for layer, (all_keys, all_values) in enumerate(zip(copy.shelf.keys, copy.shelf.values, strict=True)):
            found_keys, found_values = self.pages.gather(layer, blocks, tokens)
            keys, values = all_keys[lines], all_values[lines]
            keys[:, :, :tokens] = found_keys.permute(1, 2, 0)
            values[:, :tokens] = found_values.transpose(0, 1)
            # What the row's former sequence left may be a NaN, which no mask keeps out.
            keys[:, :, stale] = 0
            values[:, stale] = 0


def _follows(step: Step, before: Step) -> bool:
    one = step.tokens == before.tokens == 1
    return one and step.copy is before.copy and step.row == before.row and step.length == before.length + 1


def _touched(count: int, stride: int, used: int) -> int:
    """Bytes of the pages, at most, in which the first `used` bytes of `count` pieces lie that are `stride` apart."""
    if used == 0:
        return 0
    if stride % PAGE_BYTES == 0:
        return count * _pages(used)
    return min(_pages(count * stride) + PAGE_BYTES, count * (_pages(used) + PAGE_BYTES))


def _pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _untouched(size: int) -> mmap.mmap:
    """Zeros that lie nowhere until they are written: torch would write them. Private to the process, because reading
    such a page of shared memory makes one; not in pages of 2 MiB, of which a few tokens would take one for each layer.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
