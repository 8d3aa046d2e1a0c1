"""The plan of one forward on a device, where every operator costs a launch: few large ones instead of many small.

All rows' K and V go to their slots in one scatter, sequences that decode are gathered and attend together, and all that
the host says about a forward goes over in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from headway.engine.contract import Chunk
from headway.engine.pages import Pages, Plan, Span, causal_mask, checked_blocks

# Of sequences gathered at once, padded to the longest: one layer's K and V of so many tokens lie beside the slab.
BATCH_TOKENS = 1 << 18

Rows = npt.NDArray[np.int64]


class Gathered(NamedTuple):
    """n sequences that decode. rows, lengths: int64 [n]; table: int64 [n, blocks], padded with any slot of the slab.

    `rows` are those of the pack; a sequence attends to its tokens [0, length).
    """

    pages: Pages
    rows: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """See pages.Batch; `new` is read from the slab."""
        pages = self.pages
        count, blocks = self.table.shape
        tokens = blocks * pages.block_size
        seen = torch.arange(tokens, device=query.device) < self.lengths[:, None]
        unseen, slots = ~seen[:, :, None, None], self.table.flatten()
        # What lies past the end may be a NaN, which no mask keeps out.
        key, value = (
            pages.read(layer, part, slots).view(count, tokens, pages.heads, pages.dim).masked_fill_(unseen, 0)
            for part in (0, 1)
        )
        # The group of query heads that share a KV head takes the place of the rows: all see the whole sequence.
        grouped = query.index_select(0, self.rows).reshape(count, pages.heads, -1, pages.dim)
        mask = seen[:, None, None, :]
        done = attend(grouped, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scaling)
        return done.reshape(count, -1, pages.dim)


def plan_device(pages: Pages, chunks: Sequence[Chunk]) -> Plan:
    """As `plan_cpu`; its vectors are still on the host (see `vectors`)."""
    spans: list[Span] = []
    steps: list[tuple[int, int, Rows]] = []
    places: list[tuple[Rows, Rows]] = []
    row = 0
    for chunk in chunks:
        count, length = len(chunk.tokens), chunk.position + len(chunk.tokens)
        blocks = checked_blocks(pages, chunk)
        tokens = np.arange(chunk.position, length)
        places.append((blocks[tokens // pages.block_size], tokens % pages.block_size))
        if count == 1:
            steps.append((row, length, blocks))
        else:
            mask = causal_mask(count, chunk.position, pages.dtype, pages.device) if chunk.position else None
            spans.append(Span(row, row + count, length, torch.from_numpy(blocks), mask))
        row += count
    slots, offsets = (torch.from_numpy(np.concatenate(part)) for part in zip(*places, strict=True))
    batches = [_batch(pages, group) for group in _groups(pages.block_size, steps)]
    return Plan(pages, row, spans, [], [], (None, slots, offsets), batches)


def vectors(plan: Plan) -> list[torch.Tensor]:
    """All int64 tensors of the plan, for `with_vectors`."""
    of_batches = [vector for batch in plan.batches if isinstance(batch, Gathered) for vector in batch[1:]]
    return [*plan.steps[1:], *of_batches, *(span.blocks for span in plan.spans)]


def with_vectors(plan: Plan, vectors: Sequence[torch.Tensor]) -> Plan:
    """The same with these in their place, on a device."""
    given = iter(vectors)
    steps = (None, next(given), next(given))
    batches = [Gathered(plan.pages, next(given), next(given), next(given)) for _ in plan.batches]
    spans = [span._replace(blocks=next(given)) for span in plan.spans]
    return plan._replace(steps=steps, batches=batches, spans=spans)


def moved(vectors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """int64 tensors, each on the device, all in one copy."""
    packed = torch.cat([vector.flatten() for vector in vectors]).to(device)
    parts = torch.split(packed, [vector.numel() for vector in vectors])
    return [part.view(vector.shape) for part, vector in zip(parts, vectors, strict=True)]


def _groups(block_size: int, steps: list[tuple[int, int, Rows]]) -> list[list[tuple[int, int, Rows]]]:
    """Sequences of about one length together, so that little is padded, and at most BATCH_TOKENS in each group."""
    groups: list[list[tuple[int, int, Rows]]] = []
    for step in sorted(steps, key=lambda step: -step[1]):
        longest = len(groups[-1][0][2]) * block_size if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= BATCH_TOKENS:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _batch(pages: Pages, group: list[tuple[int, int, Rows]]) -> Gathered:
    table = np.zeros((len(group), len(group[0][2])), np.int64)
    for row, (_, _, blocks) in zip(table, group, strict=True):
        row[: len(blocks)] = blocks
    rows, lengths = (torch.tensor([step[part] for step in group]) for part in (0, 1))
    return Gathered(pages, rows, lengths, torch.from_numpy(table))
