"""The slab as the engine sees it, and the plan of one forward: which rows of the pack go where, and what they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from headway.core.model import KvFormat
from headway.engine.contract import Chunk, SlabArray

if TYPE_CHECKING:
    from headway.engine.batched import Batch

# Token-major inside a block: a gathered sequence is [token, head, dim] as it stands, so that attention reads it
# without a transposition: a third less time than head-major on one thread, 13 to 18 % on two (batch 1 to 16).
ORDER = "layer,kv,token,head,dim"


class Pages:
    """K and V in a slab of one full-attention group.

    layers[i] is (K, V) of layer i, each a view [slots, block_size, kv_heads, head_dim] in the format's dtype.
    """

    def __init__(self, slab: SlabArray, kv_format: KvFormat, device: torch.device) -> None:
        """`slab` is uint8 [slots, slot_stride], writable, on `device`. Raises ValueError where it is not."""
        group = kv_format.groups[0]
        dtype: torch.dtype = getattr(torch, kv_format.dtype)
        # torch takes a read-only NumPy array as if it could be written to.
        writable = slab.flags.writeable if isinstance(slab, np.ndarray) else True
        bytes_: torch.Tensor = torch.utils.dlpack.from_dlpack(slab)
        if bytes_.dtype != torch.uint8 or bytes_.ndim != 2 or not writable:
            raise ValueError("a slab is a writable uint8 array [slots, slot_stride]")
        if bytes_.device != device:
            raise ValueError(f"the slab lies on {bytes_.device}, the model on {device}")
        if bytes_.shape[1] < kv_format.slot_bytes or bytes_.shape[1] % dtype.itemsize:
            raise ValueError(f"the slab has {bytes_.shape[1]} bytes a slot, the KV format needs {kv_format.slot_bytes}")
        self.device = device
        self.slots: int = bytes_.shape[0]
        self.block_size = kv_format.block_size
        self.heads = group.kv_heads
        self.dim = group.head_dim
        inside = bytes_[:, : kv_format.slot_bytes].view(dtype)
        view = inside.view(self.slots, group.layers, 2, self.block_size, self.heads, self.dim)
        self.layers = [(view[:, layer, 0], view[:, layer, 1]) for layer in range(group.layers)]
        self._gathered = (inside.new_empty(0), inside.new_empty(0))

    def gather(self, layer: int, blocks: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens [0, tokens), each [tokens, kv_heads, head_dim], valid until the next call.

        blocks: int64 [blocks], the sequence's slots. What lies past `tokens` in the last slot is left out.
        """
        count = len(blocks)
        if count > self._gathered[0].shape[0]:
            shape = (max(count, 2 * self._gathered[0].shape[0]), self.block_size, self.heads, self.dim)
            self._gathered = (self._gathered[0].new_empty(shape), self._gathered[0].new_empty(shape))
        result = []
        for source, target in zip(self.layers[layer], self._gathered, strict=True):
            torch.index_select(source, 0, blocks, out=target[:count])
            result.append(target[:count].view(-1, self.heads, self.dim)[:tokens])
        return result[0], result[1]


class Span(NamedTuple):
    """Rows [start, stop) of the pack are one chunk, at positions [length − (stop − start), length) of its sequence.

    blocks: int64, slots of tokens [0, length). mask: [stop − start, length], 0 or −inf; None where causal order or
    a single row needs none.
    """

    start: int
    stop: int
    length: int
    blocks: torch.Tensor
    mask: torch.Tensor | None

    @property
    def cold(self) -> bool:
        return self.length == self.stop - self.start


class Run(NamedTuple):
    """Rows [start, stop) of the pack fill the whole slots [slot, slot + (stop − start) / block_size)."""

    start: int
    stop: int
    slot: int


class Piece(NamedTuple):
    """Rows [start, stop) of the pack go to one slot, from `offset` on."""

    start: int
    stop: int
    slot: int
    offset: int


class Plan(NamedTuple):
    """One forward.

    runs, pieces: where rows of longer chunks go. steps: (rows, slots, offsets), int64 each, of all other rows.
    batches: sequences that attend together; every other chunk is a span.
    """

    pages: Pages
    spans: list[Span]
    runs: list[Run]
    pieces: list[Piece]
    steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    batches: Sequence[Batch] = ()

    @property
    def vectors(self) -> list[torch.Tensor]:
        """All int64 tensors of the plan, for `with_vectors`."""
        of_batches = [vector for batch in self.batches for vector in batch]
        return [*self.steps, *of_batches, *(span.blocks for span in self.spans)]

    def with_vectors(self, vectors: Sequence[torch.Tensor]) -> Plan:
        """The same with these in their place, e.g. on a device."""
        given = iter(vectors)
        steps = (next(given), next(given), next(given))
        batches = [type(batch)(next(given), next(given), next(given)) for batch in self.batches]
        spans = [span._replace(blocks=next(given)) for span in self.spans]
        return self._replace(steps=steps, batches=batches, spans=spans)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write K and V of all rows, each [rows, kv_heads, head_dim], into the slab."""
        rows, slots, offsets = self.steps
        size = self.pages.block_size
        for source, target in zip((key, value), self.pages.layers[layer], strict=True):
            for start, stop, slot in self.runs:
                blocks = (stop - start) // size
                target[slot : slot + blocks].copy_(source[start:stop].view(blocks, size, *source.shape[1:]))
            for start, stop, slot, offset in self.pieces:
                target[slot, offset : offset + stop - start].copy_(source[start:stop])
            if len(rows):
                target[slots, offsets] = source[rows]


def plan_forward(pages: Pages, chunks: Sequence[Chunk], dtype: torch.dtype) -> Plan:
    """Where each row's K and V go and what it may see; made once a forward, used by every layer.

    Raises ValueError where a chunk is empty or its block table too short or outside the slab.
    """
    spans: list[Span] = []
    runs: list[Run] = []
    pieces: list[Piece] = []
    steps: list[tuple[int, int, int]] = []
    row = 0
    for chunk in chunks:
        count, position = len(chunk.tokens), chunk.position
        blocks = checked_blocks(pages, chunk)
        if count == 1:
            steps.append((row, int(blocks[-1]), position % pages.block_size))
        else:
            _split(pages.block_size, row, position, count, blocks, runs, pieces)
        mask = causal_mask(count, position, dtype, pages.device) if count > 1 and position > 0 else None
        spans.append(Span(row, row + count, position + count, torch.from_numpy(blocks), mask))
        row += count
    columns = torch.tensor(steps, dtype=torch.int64).view(-1, 3)
    return Plan(pages, spans, runs, pieces, (columns[:, 0], columns[:, 1], columns[:, 2]))


def checked_blocks(pages: Pages, chunk: Chunk) -> npt.NDArray[np.int64]:
    """The slots of the chunk's tokens and all before. Raises ValueError as `plan_forward`."""
    end = chunk.position + len(chunk.tokens)
    needed = -(-end // pages.block_size)
    if not chunk.tokens or chunk.position < 0:
        raise ValueError("a chunk needs tokens and a position that is not negative")
    if len(chunk.slots) < needed:
        raise ValueError(f"a block table of {len(chunk.slots)} slots cannot hold {end} tokens")
    blocks = np.asarray(chunk.slots[:needed], np.int64)
    if blocks.min() < 0 or blocks.max() >= pages.slots:
        raise ValueError(f"a block table names a slot outside the slab of {pages.slots}")
    return blocks


def causal_mask(count: int, position: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Row r sees tokens [0, position + r]."""
    mask = torch.full((count, position + count), -torch.inf, dtype=dtype, device=device)
    return torch.triu(mask, diagonal=position + 1)


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
