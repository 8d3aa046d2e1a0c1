"""Working copies: K and V of sequences that decode on a CPU, where attention reads them in one piece.

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
from torch.nn.functional import scaled_dot_product_attention

from headway.engine.pages import KeyValue, Pages

# Tokens that the smallest copies have room for; larger ones have room for powers of two times as many.
LEAST_ROOM = 256
# Of the copies that lie in one piece of memory, so that they attend in one call.
SHELF_TOKENS = 8192


class Shelf:
    """Copies with room for `room` tokens each: keys and values [layers, rows, kv_heads, room, head_dim].

    used: tokens of each row that some copy ever had; the memory of the others was never touched, and costs nothing.
    """

    def __init__(self, pages: Pages, room: int) -> None:
        self.room = room
        rows = max(1, SHELF_TOKENS // room)
        shape = (len(pages.layers), rows, pages.heads, room, pages.dim)
        self.keys, self.values = _untouched(shape, pages.dtype), _untouched(shape, pages.dtype)
        self.free = list(reversed(range(rows)))
        self.used = [0] * rows

    @property
    def idle(self) -> bool:
        return len(self.free) == len(self.used)

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
    """A sequence's next token: its row of the pack, its copy, and how many tokens it sees with it."""

    row: int
    copy: Copy
    length: int


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

    def step(self, sequence: Hashable | None, row: int, position: int, blocks: torch.Tensor) -> Step | None:
        """The step in which row `row` of the pack is the sequence's token at `position`. Its copy is made where there
        is none, and taken to get that token. None where the sequence has no name, or memory is out.

        blocks: int64, the slots of tokens [0, position].
        """
        if sequence is None:
            return None
        copy = self._by_sequence.get(sequence)
        if copy is None or copy.tokens != position or position >= copy.shelf.room:
            self._drop(sequence)
            copy = self._take(position + 1)
            if copy is None:
                return None
            self._by_sequence[sequence] = copy
            self._fill(copy, position, blocks)
            self.made[sequence] = position
        copy.tokens = position + 1
        copy.shelf.used[copy.row] = max(copy.shelf.used[copy.row], copy.tokens)
        return Step(row, copy, position + 1)

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
            # Idle shelves of other sizes give way.
            self._shelves = [shelf for shelf in self._shelves if not shelf.idle]
            shelf = Shelf(self.pages, room)
            self._shelves.append(shelf)
        row = shelf.free[-1]
        more = max(0, tokens - shelf.used[row])
        if more and sum(sum(other.used) for other in self._shelves) + more > self.most_tokens:
            self._shelves = [other for other in self._shelves if other is shelf or not other.idle]
            if sum(sum(other.used) for other in self._shelves) + more > self.most_tokens:
                return None
        return Copy(shelf, shelf.free.pop(), 0)

    def _fill(self, copy: Copy, tokens: int, blocks: torch.Tensor) -> None:
        stale = slice(tokens, copy.shelf.used[copy.row])
        for layer in range(len(self.pages.layers)):
            found = self.pages.gather(layer, blocks, tokens)
            for source, target in zip(found, (copy.shelf.keys, copy.shelf.values), strict=True):
                row = target[layer, copy.row]
                row[:, :tokens] = source.transpose(0, 1)
                # What the row's former sequence left may be a NaN, which no mask keeps out.
                row[:, stale] = 0


class Batch(NamedTuple):
    """Sequences in consecutive rows of a shelf, from `first` on, that take a step. rows: int64 [n], of the pack; each:
    int64 [n], 0 to n − 1; positions: int64 [n], where their new tokens go. mask: [n, 1, 1, longest], 0 or −inf; None
    where all see all.
    """

    shelf: Shelf
    first: int
    rows: torch.Tensor
    each: torch.Tensor
    positions: torch.Tensor
    longest: int
    mask: torch.Tensor | None

    def attend(self, layer: int, query: torch.Tensor, new: KeyValue, scaling: float | None) -> torch.Tensor:
        """See pages.Batch."""
        count = len(self.rows)
        seen = []
        for part, shelf in zip(new, (self.shelf.keys, self.shelf.values), strict=True):
            copies = shelf[layer, self.first : self.first + count]
            copies[self.each, :, self.positions] = part[self.rows]
            seen.append(copies[:, :, : self.longest])
        keys, values = seen
        grouped = query[self.rows].view(count, keys.shape[1], -1, query.shape[2])
        done = scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scaling)
        return done.reshape(count, -1, query.shape[2])


def shelved(steps: Sequence[Step]) -> list[Batch]:
    """One for each run of consecutive rows of a shelf."""
    runs: list[list[Step]] = []
    for step in sorted(steps, key=lambda step: (id(step.copy.shelf), step.copy.row)):
        before = runs[-1][-1].copy if runs else None
        if before and before.shelf is step.copy.shelf and before.row + 1 == step.copy.row:
            runs[-1].append(step)
        else:
            runs.append([step])
    return [_batch(run) for run in runs]


def _batch(steps: list[Step]) -> Batch:
    first = steps[0].copy
    lengths = [step.length for step in steps]
    longest, mask = max(lengths), None
    if min(lengths) < longest:
        shape = (len(steps), 1, 1, longest)
        unseen = torch.arange(longest) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(shape, dtype=first.shelf.keys.dtype).masked_fill_(unseen.view(shape), -torch.inf)
    rows = torch.tensor([step.row for step in steps])
    positions = torch.tensor(lengths) - 1
    return Batch(first.shelf, first.row, rows, torch.arange(len(steps)), positions, longest, mask)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that lie nowhere yet. torch would write them, NumPy ask for pages of 2 MiB."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
