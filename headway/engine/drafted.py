"""Sequences that decode together with drafts: several tokens each in one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from headway.engine.together import Step
    from headway.engine.working import Shelf


class DraftedBatch(NamedTuple):
    """n sequences in consecutive rows of a shelf that take a step, of at most `tokens` tokens. rows: see pages.Batch.

    Their heads are n · kv_heads lines of the shelf, `lines`. each, positions: int64 [len(rows) · kv_heads], the line,
    and the place there, of each new token's heads. mask: [n · kv_heads, tokens, longest], 0 or −inf.
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
        if self.grid:
            query = query[self.grid[0]]
        # A token's query heads that share a KV head are rows, one token's after another's.
        by_token = query.view(-1, self.tokens, kv_heads, heads // kv_heads, dim)
        grouped = by_token.transpose(1, 2).reshape(lines, -1, dim)
        scores = torch.bmm(grouped, keys).mul_(scaling or dim**-0.5)
        scores.view(lines, self.tokens, -1, self.longest).add_(self.mask[:, :, None])
        seen = torch.bmm(torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype), values)
        by_head = seen.view(-1, kv_heads, self.tokens, heads // kv_heads, dim)
        found = by_head.transpose(1, 2).reshape(-1, heads, dim)
        return found[self.grid[1]] if self.grid else found


def drafted_batch(steps: Sequence[Step], rows: int) -> DraftedBatch:
    """Of steps in the order of their copies' rows; the pack has so many `rows`."""
    first, last = steps[0].copy, steps[-1].copy
    heads, dtype = first.shelf.heads, first.shelf.keys[0].dtype
    lengths = torch.tensor([step.length for step in steps])[:, None]
    counts = torch.tensor([step.tokens for step in steps])[:, None]
    longest, tokens = int(lengths.max()), int(counts.max())
    ahead = torch.minimum(torch.arange(tokens), counts - 1)
    # int64 [sequences, tokens]: of each new token, and of a sequence's last one again where others have more.
    positions = lengths - counts + ahead
    unseen = torch.arange(longest) > positions[:, :, None]
    mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf).repeat_interleave(heads, 0)
    grid, own = None, torch.arange(tokens) < counts
    if not bool(own.all()):
        before = counts.cumsum(0) - counts
        grid = (before + ahead).flatten(), own.flatten().nonzero().flatten()
    of_pack = [row for step in steps for row in range(step.row, step.row + step.tokens)]
    at = None if of_pack == list(range(rows)) else torch.tensor(of_pack)
    lines = slice(first.row * heads, (last.row + 1) * heads)
    each = torch.arange(lines.start, lines.stop).view(-1, 1, heads).expand(-1, tokens, -1)[own].flatten()
    places = positions[own].repeat_interleave(heads)
    return DraftedBatch(first.shelf, at, tokens, lines, each, places, longest, mask, grid)
