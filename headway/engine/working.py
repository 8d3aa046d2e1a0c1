"""Working copies: K and V of sequences that decode on a CPU, as attention reads them fastest.

V lies head by head in one piece, K transposed: a few rows times a matrix are fastest where the matrix is read along its
rows (8 contexts of 512 tokens, both products: 9 ms, against 12 of torch's fused attention over K as it comes).

The slab stays the truth: a step's K and V go to both. A copy is made from the slab before a sequence's first step here,
which takes about as long as attention over the slab takes in one step; without a copy it takes that long in every step.
"""

from __future__ import annotations

import math
import mmap
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from headway.engine.pages import Pages

# Tokens that the smallest copies have room for; larger ones have room for powers of two times as many.
LEAST_ROOM = 256
PAGE_BYTES = 4096
# Of the copies that lie in one piece of memory, so that they attend in one call.
SHELF_TOKENS = 8192


class Shelf:
    """Copies with room for `room` tokens each. Of each layer, and of row r head h at r · kv_heads + h: keys [rows ·
    kv_heads, head_dim, room], values [rows · kv_heads, room, head_dim].

    used: tokens of each row that some copy ever had; memory that no token touched lies nowhere yet.
    """

    def __init__(self, pages: Pages, room: int) -> None:
        self.room, self.heads = room, pages.heads
        rows = max(1, SHELF_TOKENS // room)
        layers, lines = len(pages.pairs), rows * pages.heads
        self.keys = list(_untouched((layers, lines, pages.dim, room), pages.dtype))
        self.values = list(_untouched((layers, lines, room, pages.dim), pages.dtype))
        self.free = list(reversed(range(rows)))
        self.used = [0] * rows

    @property
    def idle(self) -> bool:
        return len(self.free) == len(self.used)

    def resident(self, tokens: int) -> int:
        """Of a row of which so many tokens were used, those whose memory is there: a page of keys has one of each of
        many tokens.
        """
        page: int = PAGE_BYTES // self.keys[0].itemsize
        return (min(self.room, -(-tokens // page) * page) + tokens) // 2

    def put_back(self, row: int) -> None:
        self.free.append(row)
        self.free.sort(reverse=True)


@dataclass(slots=True)
class Copy:
    """A sequence's tokens [0, tokens) in a row of a shelf."""

    shelf: Shelf
    row: int
    tokens: int


class Step(NamedTuple):
    """A sequence's next token and the drafts after it, `tokens` in all: the first one's row of the pack, the sequence's
    copy, and how many tokens the last one sees with itself.
    """

    row: int
    copy: Copy
    length: int
    tokens: int = 1


@dataclass
class Copies:
    """Of one slab; where `most_tokens` are in memory, no more are made, though those that are there still grow."""

    pages: Pages
    most_tokens: int
    # By sequence, tokens that were copied since `clean`.
    made: dict[Hashable, int] = field(default_factory=dict)
    _by_sequence: dict[Hashable, Copy] = field(default_factory=dict)
    _shelves: list[Shelf] = field(default_factory=list)
    # Put there by another thread than the engine's.
    _ended: deque[Hashable] = field(default_factory=deque)

    def forget(self, sequence: Hashable) -> None:
        """It does not decode here any more. From any thread."""
        self._ended.append(sequence)

    def clean(self) -> None:
        """Before a forward: take back the rows of what was forgotten."""
        self.made.clear()
        while self._ended:
            self._drop(self._ended.popleft())

    def step(
        self, sequence: Hashable | None, row: int, position: int, blocks: torch.Tensor, count: int = 1
    ) -> Step | None:
        """The step in which row `row` of the pack is the sequence's token at `position`, and those after it, `count` in
        all, are drafts. Its copy is made where there is none, and taken to get those tokens. None where the sequence
        has no name, or memory is out.

        blocks: int64, the slots of tokens [0, position + count).
        """
        if sequence is None:
            return None
        copy = self._by_sequence.get(sequence)
        # What the copy has at `position` and after it were drafts that did not hold, and is written over.
        if copy is None or copy.tokens < position or position + count > copy.shelf.room:
            self._drop(sequence)
            copy = self._take(position + count)
            if copy is None:
                return None
            self._by_sequence[sequence] = copy
            self._fill(copy, position, blocks)
            self.made[sequence] = position
        copy.tokens = position + count
        copy.shelf.used[copy.row] = max(copy.shelf.used[copy.row], copy.tokens)
        return Step(row, copy, position + count, count)

    def _drop(self, sequence: Hashable) -> None:
        copy = self._by_sequence.pop(sequence, None)
        if copy is not None:
            copy.shelf.put_back(copy.row)

    def _take(self, tokens: int) -> Copy | None:
        """A free row, of the first shelf that has one. Idle shelves stay, because memory that was used once is there at
        once; they go where there would be too much.
        """
        room = LEAST_ROOM
        while room < tokens:
            room *= 2
        shelf = next((shelf for shelf in self._shelves if shelf.room == room and shelf.free), None)
        if shelf is None:
            shelf = Shelf(self.pages, room)
            self._shelves.append(shelf)
        used = shelf.used[shelf.free[-1]]
        more = max(0, shelf.resident(tokens) - shelf.resident(used))
        for idle in [other for other in self._shelves if other.idle and other is not shelf]:
            if self._used + more <= self.most_tokens:
                break
            self._shelves.remove(idle)
        if more and self._used + more > self.most_tokens:
            return None
        return Copy(shelf, shelf.free.pop(), 0)

    @property
    def _used(self) -> int:
        return sum(shelf.resident(used) for shelf in self._shelves for used in shelf.used)

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


class Batch(NamedTuple):
    """n sequences in consecutive rows of a shelf that take a step, of at most `tokens` tokens. rows: see pages.Batch.

    Their heads are n · kv_heads lines of the shelf, `lines`. each, positions: int64 [len(rows) · kv_heads], the line,
    and the place there, of each new token's heads. mask: [1 or n · kv_heads, tokens, 1 or longest], 0 or −inf.
    grid: where not all have as many tokens, which of `rows` stand in n · tokens places, a sequence's last one repeated,
    and in which of these places each row is found.
    """

    shelf: Shelf
    rows: torch.Tensor | None
    tokens: int
    lines: slice
    each: torch.Tensor
    positions: torch.Tensor
    longest: int
    mask: torch.Tensor
    grid: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """See pages.Batch."""
        heads, dim = query.shape[1:]
        lines, kv_heads = self.lines.stop - self.lines.start, self.shelf.heads
        if self.rows is not None:
            query, new = query[self.rows], new[self.rows]
        keys, values = self.shelf.keys[layer], self.shelf.values[layer]
        keys[self.each, :, self.positions] = new[:, 0].reshape(-1, dim)
        values[self.each, self.positions] = new[:, 1].reshape(-1, dim)
        keys, values = keys[self.lines, :, : self.longest], values[self.lines, : self.longest]
        if self.tokens == 1:
            # The query heads that share a KV head are the rows.
            grouped = query.reshape(lines, -1, dim)
            scores = torch.baddbmm(self.mask, grouped, keys, alpha=scaling or dim**-0.5)
        else:
            if self.grid:
                query = query[self.grid[0]]
            by_token = query.view(-1, self.tokens, kv_heads, heads // kv_heads, dim)
            grouped = by_token.transpose(1, 2).reshape(lines, -1, dim)
            scores = torch.bmm(grouped, keys).mul_(scaling or dim**-0.5)
            scores.view(lines, self.tokens, -1, self.longest).add_(self.mask[:, :, None])
        shares = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
        seen = torch.bmm(shares, values)
        if self.tokens == 1:
            return seen.view(-1, heads, dim)
        by_head = seen.view(-1, kv_heads, self.tokens, heads // kv_heads, dim)
        found = by_head.transpose(1, 2).reshape(-1, heads, dim)
        return found[self.grid[1]] if self.grid else found


def shelved(steps: Sequence[Step], rows: int) -> list[Batch]:
    """One for each run of consecutive rows of a shelf; the pack has so many `rows`."""
    runs: list[list[Step]] = []
    for step in sorted(steps, key=lambda step: (id(step.copy.shelf), step.copy.row)):
        before = runs[-1][-1].copy if runs else None
        if before and before.shelf is step.copy.shelf and before.row + 1 == step.copy.row:
            runs[-1].append(step)
        else:
            runs.append([step])
    return [_batch(run, rows) for run in runs]


def _batch(steps: list[Step], count: int) -> Batch:
    first, last = steps[0].copy, steps[-1].copy
    heads, dtype = first.shelf.heads, first.shelf.keys[0].dtype
    lengths, counts = (torch.tensor([step[part] for step in steps])[:, None] for part in (2, 3))
    longest, tokens, mask = int(lengths.max()), int(counts.max()), torch.zeros(1, 1, 1, dtype=dtype)
    ahead = torch.minimum(torch.arange(tokens), counts - 1)
    # int64 [sequences, tokens]: of each new token, and of a sequence's last one again where others have more.
    positions = lengths - counts + ahead
    if tokens > 1 or int(lengths.min()) < longest:
        unseen = torch.arange(longest) > positions[:, :, None]
        mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf).repeat_interleave(heads, 0)
    grid, own = None, torch.arange(tokens) < counts
    if not bool(own.all()):
        before = counts.cumsum(0) - counts
        grid = (before + ahead).flatten(), own.flatten().nonzero().flatten()
    rows = [row for step in steps for row in range(step.row, step.row + step.tokens)]
    at = None if rows == list(range(count)) else torch.tensor(rows)
    lines = slice(first.row * heads, (last.row + 1) * heads)
    each = torch.arange(lines.start, lines.stop).view(-1, 1, heads).expand(-1, tokens, -1)[own].flatten()
    places = positions[own].repeat_interleave(heads)
    return Batch(first.shelf, at, tokens, lines, each, places, longest, mask, grid)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that lie nowhere yet. torch would write them, NumPy ask for pages of 2 MiB."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
