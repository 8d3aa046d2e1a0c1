"""The plan of one forward on a CPU: chunks attend one by one, sequences that decode together, over working copies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from headway.engine.contract import Chunk
from headway.engine.pages import Pages, Piece, Plan, Run, Span, causal_mask, checked_blocks, checked_slot
from headway.engine.together import Step
from headway.engine.working import Copies


def plan_cpu(pages: Pages, chunks: Sequence[Chunk], copies: Copies) -> Plan:
    """Where each row's K and V go and what it may see; made once a forward, used by every layer.

    Steps (one token, and drafts after it) of sequences that have a name attend to working copies. Raises ValueError
    where a chunk is empty or its block table too short or outside the slab.
    """
    spans: list[Span] = []
    runs: list[Run] = []
    pieces: list[Piece] = []
    steps: list[tuple[int, int, int]] = []
    copied: list[Step] = []
    row = 0
    copies.clean()
    for chunk in chunks:
        count, position = len(chunk.tokens), chunk.position
        step, is_step = None, count == 1 + chunk.drafts
        if count == 1:
            steps.append((row, checked_slot(pages, chunk), position % pages.block_size))
        elif is_step:
            blocks = checked_blocks(pages, chunk)
            places = (divmod(place, pages.block_size) for place in range(position, position + count))
            steps += [(row + at, int(blocks[block]), offset) for at, (block, offset) in enumerate(places)]
        if is_step:
            step = copies.step(chunk.sequence, row, position, partial(_table, pages, chunk), count)
        if step is not None:
            copied.append(step)
        else:
            spans.append(_span(pages, chunk, row))
        if not is_step:
            _split(pages.block_size, row, position, count, spans[-1].blocks.numpy(), runs, pieces)
        row += count
    rows, slots, offsets = torch.tensor(steps, dtype=torch.int64).view(-1, 3).unbind(1)
    all_steps = len(steps) == row
    batches = copies.together(copied, row)
    return Plan(pages, row, spans, runs, pieces, (None if all_steps else rows, slots, offsets), batches)


def _table(pages: Pages, chunk: Chunk) -> torch.Tensor:
    return torch.from_numpy(checked_blocks(pages, chunk))


def _span(pages: Pages, chunk: Chunk, row: int) -> Span:
    count, position = len(chunk.tokens), chunk.position
    masked = count > 1 and position > 0 and not pages.plain_products
    mask = causal_mask(count, position, pages.dtype, pages.device) if masked else None
    return Span(row, row + count, position + count, _table(pages, chunk), mask)


def _split(
    size: int,
    row: int,
    position: int,
    count: int,
    blocks: npt.NDArray[np.int64],
    runs: list[Run],
    pieces: list[Piece],
) -> None:
    """Cut a chunk at block borders; whole blocks in consecutive slots become one run."""
    end = row + count
    first = row - position  # the row at which the sequence's token 0 would lie
    while row < end:
        block, offset = divmod(row - first, size)
        slot = int(blocks[block])
        stop = min(end, row + size - offset)
        if stop - row < size:
            pieces.append(Piece(row, stop, slot, offset))
        elif runs and runs[-1].stop == row and runs[-1].slot + (row - runs[-1].start) // size == slot:
            runs[-1] = Run(runs[-1].start, stop, runs[-1].slot)
        else:
            runs.append(Run(row, stop, slot))
        row = stop
