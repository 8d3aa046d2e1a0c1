"""The plan of one forward on a device, where every operator costs a launch: few large ones instead of many small.

All rows' K and V go to their slots in one scatter, sequences whose K and V are in the slab attend as the reader does it
(engine.paged), and all that the host says about a forward goes over in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headway.engine.contract import Chunk
from headway.engine.paged import DeviceBatch, Gather, Part, Reader, Slots
from headway.engine.pages import Pages, Plan, Span, causal_mask, checked_blocks

GATHER: Reader = Gather()


def plan_device(pages: Pages, chunks: Sequence[Chunk], reader: Reader = GATHER, width: int = 1) -> Plan:
    """As `plan_cpu`; its vectors are still on the host (see `vectors`). width: of block tables, at least."""
    spans: list[Span] = []
    steps: list[Part] = []
    later: list[Part] = []
    places: list[tuple[Slots, Slots]] = []
    row = 0
    for chunk in chunks:
        count, length = len(chunk.tokens), chunk.position + len(chunk.tokens)
        blocks = checked_blocks(pages, chunk)
        tokens = np.arange(chunk.position, length)
        places.append((blocks[tokens // pages.block_size], tokens % pages.block_size))
        if count == 1:
            steps.append(Part(row, 1, length, blocks))
        elif chunk.position and reader.takes_chunks:
            later.append(Part(row, count, length, blocks))
        else:
            mask = causal_mask(count, chunk.position, pages.dtype, pages.device) if chunk.position else None
            spans.append(Span(row, row + count, length, torch.from_numpy(blocks), mask))
        row += count
    slots, offsets = (torch.from_numpy(np.concatenate(part)) for part in zip(*places, strict=True))
    batches = [batch for parts in (steps, later) if parts for batch in reader.batches(pages, parts, row, width)]
    return Plan(pages, row, spans, [], [], (None, slots, offsets), batches)


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
