"""The plan of one forward on a device, where every operator costs a launch: few large ones instead of many small.

All rows' K and V go to their slots in one scatter, sequences whose K and V are in the slab attend as the reader does it
(engine.paged), and all that the host says about a forward goes over in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headway.engine.contract import Chunk
from headway.engine.paged import DeviceBatch, Gather, Ids, Parts, Reader
from headway.engine.pages import Pages, Plan, Span, causal_mask, checked_blocks

GATHER: Reader = Gather()


def plan_device(pages: Pages, chunks: Sequence[Chunk], reader: Reader = GATHER, width: int = 1) -> Plan:
    """As `plan_cpu`; its vectors are still on the host (see `vectors`). width: of block tables, at least."""
    new = np.array([len(chunk.tokens) for chunk in chunks])
    position = np.array([chunk.position for chunk in chunks])
    row, length = np.cumsum(new) - new, position + new
    table = _block_tables(pages, chunks, length, width)
    rows = int(new.sum())
    of_row = np.repeat(np.arange(len(chunks)), new)
    token = np.arange(rows) + (position - row)[of_row]
    slots, offsets = table[of_row, token // pages.block_size], token % pages.block_size
    steps = new == 1
    later = ~steps & (position > 0) & reader.takes_chunks
    batches: list[DeviceBatch] = []
    for some in (steps, later):
        if some.any():
            widest = max(width, -(-int(length[some].max()) // pages.block_size))
            parts = Parts(row[some], new[some], length[some], table[some, :widest])
            batches += reader.batches(pages, parts, rows, width)
    spans = []
    for at in np.flatnonzero(~steps & ~later).tolist():
        start, count, end = int(row[at]), int(new[at]), int(length[at])
        mask = causal_mask(count, end - count, pages.dtype, pages.device) if end > count else None
        blocks = torch.from_numpy(table[at, : -(-end // pages.block_size)])
        spans.append(Span(start, start + count, end, blocks, mask))
    places = (torch.from_numpy(slots), torch.from_numpy(offsets))
    return Plan(pages, rows, spans, [], [], (None, *places), batches)


def _block_tables(pages: Pages, chunks: Sequence[Chunk], lengths: Ids, width: int) -> Ids:
    """The slots of each chunk's tokens and all before, [chunks, at least width]. Raises ValueError as `plan_cpu`."""
    needed = -(-lengths // pages.block_size)
    table = np.zeros((len(chunks), max(width, int(needed.max()))), np.int64)
    for row, chunk, count in zip(table, chunks, needed.tolist(), strict=True):
        if not chunk.tokens or chunk.position < 0 or len(chunk.slots) < count:
            checked_blocks(pages, chunk)
        row[:count] = chunk.slots[:count]
    if table.min() < 0 or table.max() >= pages.slots:
        for chunk in chunks:
            checked_blocks(pages, chunk)
    return table


def vectors(plan: Plan) -> list[torch.Tensor]:
    """All int64 tensors of the plan, for `with_vectors`."""
    of_batches = [vector for batch in _batches(plan) for vector in batch.vectors()]
    return [*plan.steps[1:], *of_batches, *(span.blocks for span in plan.spans)]


def with_vectors(plan: Plan, vectors: Sequence[torch.Tensor]) -> Plan:
    """The same with these in their place, on a device."""
    given = iter(vectors)
    steps = (None, next(given), next(given))
    batches = [batch.placed([next(given) for _ in batch.vectors()]) for batch in _batches(plan)]
    spans = [span._replace(blocks=next(given)) for span in plan.spans]
    return plan._replace(steps=steps, batches=batches, spans=spans)


def moved(vectors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """int64 tensors, each on the device, all in one copy, for which the host does not wait."""
    return parted(packed(vectors, device).to(device, non_blocking=True), vectors)


def packed(vectors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """All in one piece of the host's memory, from which the device can copy by itself."""
    numbers = sum(vector.numel() for vector in vectors)
    # torch gives pinned memory out again only when the copies from it are done.
    whole = torch.empty(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return torch.cat([vector.flatten() for vector in vectors], out=whole)


def parted(whole: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of it, one after another, of these shapes."""
    parts = torch.split(whole, [vector.numel() for vector in like])
    return [part.view(vector.shape) for part, vector in zip(parts, like, strict=True)]


def _batches(plan: Plan) -> list[DeviceBatch]:
    """`plan_device` makes no others."""
    return list(plan.batches)  # type: ignore[arg-type]
