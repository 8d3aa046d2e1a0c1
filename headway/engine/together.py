"""Sequences that decode together over working copies that lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from headway.engine.drafted import DraftedBatch, drafted_batch

if TYPE_CHECKING:
    from headway.engine.working import Copy

# A batch reads tokens up to the next multiple of this: oneDNN makes code for each length and keeps it, and what a batch
# needs beside K and V is good for so many steps.
LENGTHS = 32


class Step(NamedTuple):
    """A sequence's next token and the drafts after it, `tokens` in all: the first one's row of the pack, the sequence's
    copy, and how many tokens the last one sees with itself.
    """

    row: int
    copy: Copy
    length: int
    tokens: int = 1


class Batch:
    """n sequences in consecutive rows of a shelf that take a step of one token. rows: see pages.Batch.

    Their heads are n · kv_heads lines of the shelf. It serves as many steps of the same sequences as there are, one
    `advance` between two of them.
    """

    def __init__(self, steps: Sequence[Step], rows: torch.Tensor | None) -> None:
        """steps: in the order of their copies' rows."""
        self.rows = rows
        self._shelf = shelf = steps[0].copy.shelf
        self._first = steps[0].copy.row * shelf.heads
        self._count = len(steps) * shelf.heads
        self._lengths = [step.length for step in steps]
        self._put = self._places()
        # From one token to the next: in keys, in values.
        self._further = torch.tensor([1, shelf.dim]).view(1, 2, 1, 1)
        self._see()

    def advance(self) -> None:
        """Each sequence is one token further."""
        self._lengths = [length + 1 for length in self._lengths]
        self._put += self._further
        if max(self._lengths) > self._longest:
            self._see()
        else:
            self._shown += 1
            self._mask.view(-1).index_fill_(0, self._shown, 0)

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """See pages.Batch."""
        count, dim = self._count, query.shape[2]
        if self.rows is not None:
            query, new = query[self.rows], new[self.rows]
        shelf = self._shelf
        shelf.flat[layer].put_(self._put, new)
        keys, values = self._keys[layer], self._values[layer]
        # The query heads that share a KV head are the rows.
        scores = torch.baddbmm(self._mask, query.reshape(count, -1, dim), keys, alpha=scaling or dim**-0.5)
        return torch.bmm(torch.softmax(scores, -1), values).view(-1, query.shape[1], dim)

    def _places(self) -> torch.Tensor:
        """int64 [n, 2, kv_heads, head_dim]: where the numbers of the new tokens go in a layer of the shelf."""
        shelf = self._shelf
        lines = torch.arange(self._first, self._first + self._count).view(-1, 1, shelf.heads, 1)
        tokens = torch.tensor(self._lengths).sub_(1).view(-1, 1, 1, 1)
        keys = (lines * shelf.dim + torch.arange(shelf.dim)) * shelf.room + tokens
        values = (lines * shelf.room + tokens) * shelf.dim + torch.arange(shelf.dim) + shelf.keys[0].numel()
        return torch.cat([keys, values], 1)

    def _see(self) -> None:
        """What the batch reads of the shelf, and of that each line sees: mask [n · kv_heads, 1, longest], 0 or −inf."""
        shelf, lines = self._shelf, slice(self._first, self._first + self._count)
        self._longest = longest = min(shelf.room, -(-max(self._lengths) // LENGTHS) * LENGTHS)
        self._keys = [keys[lines, :, :longest] for keys in shelf.keys]
        self._values = [values[lines, :longest] for values in shelf.values]
        lengths = torch.tensor(self._lengths).repeat_interleave(shelf.heads)
        unseen = torch.arange(longest) >= lengths[:, None]
        self._mask = torch.zeros(unseen.shape, dtype=shelf.flat[0].dtype).masked_fill_(unseen, -torch.inf)[:, None]
        self._shown = torch.arange(self._count) * longest + lengths - 1


def batches_of(steps: Sequence[Step], rows: int) -> list[Batch | DraftedBatch]:
    """One for each run of consecutive rows of a shelf; the pack has so many `rows`."""
    runs: list[list[Step]] = []
    for step in sorted(steps, key=lambda step: (id(step.copy.shelf), step.copy.row)):
        before = runs[-1][-1].copy if runs else None
        if before and before.shelf is step.copy.shelf and before.row + 1 == step.copy.row:
            runs[-1].append(step)
        else:
            runs.append([step])
    return [_batch(run, rows) for run in runs]


def _batch(steps: list[Step], count: int) -> Batch | DraftedBatch:
    if any(step.tokens > 1 for step in steps):
        return drafted_batch(steps, count)
    rows = [step.row for step in steps]
    return Batch(steps, None if rows == list(range(count)) else torch.tensor(rows))
