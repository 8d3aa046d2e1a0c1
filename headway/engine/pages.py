"""The slab as the engine sees it, and the plan of one forward: which rows of the pack go where, and what they see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headway.core.model import KvFormat
from headway.engine.contract import Chunk, SlabArray

# Token-major inside a block: a gathered sequence is [token, head, dim] as it stands, so that attention reads it
# without a transposition: a third less time than head-major on one thread, 13 to 18 % on two (batch 1 to 16).
ORDER = "layer,kv,token,head,dim"
# Of int8: after the numbers of all layers, a scale for each token and head, as exact as it costs nothing.
SCALED = f"{ORDER}; float32 layer,kv,token,head"
SCALE = torch.float32


class Pages:
    """K and V in a slab of one full-attention group.

    pairs[i] is layer i, a view [slots, 2 (K, V), block_size, kv_heads, head_dim] in the format's dtype. Of int8, scales
    follow all layers' numbers: scales[i], float32 [slots, 2, block_size, kv_heads], one for each token and head.
    dtype: of what attention reads; float32 for int8. plain_products: whether chunks attend by these (see attention.py).
    """

    def __init__(self, slab: SlabArray, kv_format: KvFormat, device: torch.device) -> None:
        """`slab` is uint8 [slots, slot_stride], writable, on `device`. Raises ValueError where it is not."""
        group = kv_format.groups[0]
        stored: torch.dtype = getattr(torch, kv_format.dtype)
        # torch takes a read-only NumPy array as if it could be written to.
        writable = slab.flags.writeable if isinstance(slab, np.ndarray) else True
        bytes_: torch.Tensor = torch.utils.dlpack.from_dlpack(slab)
        if bytes_.dtype != torch.uint8 or bytes_.ndim != 2 or not writable:
            raise ValueError("a slab is a writable uint8 array [slots, slot_stride]")
        if bytes_.device != device:
            raise ValueError(f"the slab lies on {bytes_.device}, the model on {device}")
        if bytes_.shape[1] < kv_format.slot_bytes or bytes_.shape[1] % SCALE.itemsize:
            raise ValueError(f"the slab has {bytes_.shape[1]} bytes a slot, the KV format needs {kv_format.slot_bytes}")
        self.device = device
        self.dtype = torch.float32 if stored == torch.int8 else stored
        self.plain_products = self.dtype == torch.bfloat16 and device.type == "cpu"
        self.slots: int = bytes_.shape[0]
        self.block_size = kv_format.block_size
        self.heads = group.kv_heads
        self.dim = group.head_dim
        # Of a copy, which has the dtype that attention reads.
        self.token_bytes = group.layers * 2 * self.heads * self.dim * self.dtype.itemsize
        shape = (self.slots, group.layers, 2, self.block_size, self.heads)
        numbers = math.prod(shape[1:]) * self.dim * stored.itemsize
        view = bytes_[:, :numbers].view(stored).view(*shape, self.dim)
        self.pairs = [view[:, layer] for layer in range(group.layers)]
        self._gathered = (torch.empty(0, dtype=self.dtype, device=device),) * 2
        self.scales: list[torch.Tensor] = []
        if stored == torch.int8:
            scales = bytes_[:, numbers : kv_format.slot_bytes].view(SCALE).view(shape)
            self.scales = [scales[:, layer] for layer in range(group.layers)]

    def gather(self, layer: int, blocks: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens [0, tokens), each [tokens, kv_heads, head_dim], valid until the next call.

        blocks: int64 [blocks], the sequence's slots. What lies past `tokens` in the last slot is left out.
        """
        count = len(blocks)
        if count > len(self._gathered[0]):
            shape = (max(count, 2 * len(self._gathered[0])), self.block_size, self.heads, self.dim)
            self._gathered = (self._gathered[0].new_empty(shape), self._gathered[0].new_empty(shape))
        key, value = (
            self.read(layer, part, blocks, out=self._gathered[part][:count]).view(-1, self.heads, self.dim)[:tokens]
            for part in (0, 1)
        )
        return key, value

    def read(self, layer: int, part: int, blocks: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """K (part 0) or V (1) of these slots: [len(blocks), block_size, kv_heads, head_dim]."""
        source = self.pairs[layer][:, part]
        if not self.scales:
            return torch.index_select(source, 0, blocks, out=out)
        scales = self.scales[layer][:, part].index_select(0, blocks).unsqueeze(-1)
        return torch.mul(source.index_select(0, blocks), scales, out=out)


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


class Batch(Protocol):
    """Rows of the pack, one of each of n sequences, that attend together."""

    @property
    def rows(self) -> torch.Tensor | None:
        """int64 [n]; None: all rows of the pack in their order."""

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """query [rows of the pack, heads, dim], new K and V [rows of the pack, 2, kv_heads, dim] → [n, heads, dim].

        K and V of all rows are in the slab already.
        """


class Plan(NamedTuple):
    """One forward.

    rows: of the pack, that are tokens; any that follow only fill it up. runs, pieces: where rows of longer chunks go.
    steps: (rows, slots, offsets), int64 each, of all other rows; rows is None where those are all. batches: sequences
    that attend together; every other chunk is a span. between: called between two layers, see contract.Engine.
    """

    pages: Pages
    rows: int
    spans: list[Span]
    runs: list[Run]
    pieces: list[Piece]
    steps: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
    batches: Sequence[Batch] = ()
    between: Callable[[], None] | None = None

    def store(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Write K and V of all rows, [rows, 2, kv_heads, head_dim] in the dtype of the pages, into the slab. → what the
        slab gives back for them, to the bit: a token attends to the same numbers in whichever step it sees them.
        """
        pages = self.pages
        if not pages.scales:
            self._write(pages.pairs[layer], new)
            return new
        scale = (new.abs().amax(-1) / 127).clamp_(min=1e-12)
        steps = (new / scale.unsqueeze(-1)).round_()
        self._write(pages.scales[layer], scale)
        self._write(pages.pairs[layer], steps.to(torch.int8))
        return steps.mul_(scale.unsqueeze(-1))

    def _write(self, target: torch.Tensor, new: torch.Tensor) -> None:
        """target [slots, 2, block_size, …], new [rows, 2, …]"""
        (rows, slots, offsets), size = self.steps, self.pages.block_size
        for start, stop, slot in self.runs:
            blocks = (stop - start) // size
            whole = new[start:stop].view(blocks, size, *new.shape[1:])
            target[slot : slot + blocks].copy_(whole.transpose(1, 2))
        for start, stop, slot, offset in self.pieces:
            target[slot, :, offset : offset + stop - start].copy_(new[start:stop].transpose(0, 1))
        if len(slots):
            target[slots, :, offsets] = new if rows is None else new[rows]


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


def checked_slot(pages: Pages, chunk: Chunk) -> int:
    """That of the chunk's last token; the same refusals, of this slot alone."""
    last = (chunk.position + len(chunk.tokens) - 1) // pages.block_size
    if chunk.position < 0 or last >= len(chunk.slots) or not 0 <= (slot := int(chunk.slots[last])) < pages.slots:
        checked_blocks(pages, chunk)
        raise ValueError(f"a block table names a slot outside the slab of {pages.slots}")
    return slot


def causal_mask(count: int, position: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Row r sees tokens [0, position + r]."""
    mask = torch.full((count, position + count), -torch.inf, dtype=dtype, device=device)
    return torch.triu(mask, diagonal=position + 1)
