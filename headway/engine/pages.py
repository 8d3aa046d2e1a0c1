"""The slab as the engine sees it, and the plan of one forward: which rows of the pack go where, and what they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headway.core.model import KvFormat
from headway.engine.contract import Chunk, SlabArray

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
        self.dtype = dtype
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


KeyValue = tuple[torch.Tensor, torch.Tensor]


class Batch(Protocol):
    """Rows of the pack, one of each of n sequences, that attend together."""

    @property
    def rows(self) -> torch.Tensor:
        """int64 [n]"""

    def attend(self, layer: int, query: torch.Tensor, new: KeyValue, scaling: float | None) -> torch.Tensor:
        """query [rows of the pack, heads, dim], new K and V [rows of the pack, kv_heads, dim] → [n, heads, dim].

        K and V of all rows are in the slab already.
        """


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


def checked_blocks(pages: Pages, chunk: Chunk) -> npt.NDArray[np.int64]:
    """The slots of the chunk's tokens and all before. Raises ValueError as `plan_cpu`."""
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
