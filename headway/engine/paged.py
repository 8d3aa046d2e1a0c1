"""How attention on a device reads the slab: readers, and those that torch alone makes possible.

A reader makes batches of sequences whose earlier K and V lie in slots. In place: torch's own kernel where it takes a
block table (`Varlen`), or one of ours (engine.paged_triton). Otherwise what they need is gathered first (`Gather`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from headway.engine.pages import Batch, Pages

# Of sequences gathered at once, padded to the longest: one layer's K and V of so many tokens lie beside the slab.
BATCH_TOKENS = 1 << 18

Ids = npt.NDArray[np.int64]


class Parts(NamedTuple):
    """Of n sequences the last `new` tokens, of `lengths`; they are rows [row, row + new) of the pack. int64 [n] each.

    table: int64 [n, blocks], the slots of each, padded with any slot of the slab.
    """

    row: Ids
    new: Ids
    lengths: Ids
    table: Ids

    @property
    def rows(self) -> Ids:
        """All of them, in order."""
        if (self.new == 1).all():
            return self.row
        return np.repeat(self.row - np.cumsum(self.new) + self.new, self.new) + np.arange(self.new.sum())


class DeviceBatch(Batch, Protocol):
    """A batch whose tensors of the host go over with those of the whole plan."""

    def vectors(self) -> list[torch.Tensor]:
        """int64 each."""

    def placed(self, vectors: Sequence[torch.Tensor]) -> DeviceBatch:
        """The same with these in place of its own."""


class Reader(Protocol):
    """name: as it is logged and shown. takes_chunks: whether parts may have more than one row."""

    @property
    def name(self) -> str: ...

    @property
    def takes_chunks(self) -> bool: ...

    def batches(self, pages: Pages, parts: Parts, rows: int, width: int) -> Sequence[DeviceBatch]:
        """Batches of these parts, each row in one of them; the pack has so many `rows`. Block tables are not cut to
        less than `width`: where no sequence needs more, the shapes of steps depend on how many there are, and on it.
        """


class Gathered(NamedTuple):
    """n sequences that decode. rows, lengths: int64 [n]; table: int64 [n, blocks], padded with any slot of the slab.

    `rows` are those of the pack; a sequence attends to its tokens [0, length).
    """

    pages: Pages
    rows: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor

    def vectors(self) -> list[torch.Tensor]:
        return [self.rows, self.lengths, self.table]

    def placed(self, vectors: Sequence[torch.Tensor]) -> Gathered:
        return Gathered(self.pages, *vectors)

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
        done = scaled_dot_product_attention(
            grouped, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scaling
        )
        return done.reshape(count, -1, pages.dim)


class Gather:
    """Copies K and V of all sequences of a layer, then torch's attention: works wherever torch does."""

    name = "gather"
    takes_chunks = False

    def batches(self, pages: Pages, parts: Parts, rows: int, width: int) -> list[Gathered]:
        """See Reader. Sequences of about one length together, so that little is padded."""
        needed = np.maximum(width, -(-parts.lengths // pages.block_size))
        groups: list[list[int]] = []
        for part in np.argsort(-parts.lengths, kind="stable").tolist():
            if groups and (len(groups[-1]) + 1) * needed[groups[-1][0]] * pages.block_size <= BATCH_TOKENS:
                groups[-1].append(part)
            else:
                groups.append([part])
        return [self._batch(pages, parts, group, int(needed[group[0]])) for group in groups]

    def _batch(self, pages: Pages, parts: Parts, group: list[int], width: int) -> Gathered:
        each = (parts.row[group], parts.lengths[group], parts.table[group, :width])
        return Gathered(pages, *(torch.from_numpy(part) for part in each))


class Varied(NamedTuple):
    """Parts for torch's varlen attention: rows of the pack, int64; first row of each part and of the next one [n + 1],
    lengths [n] and block tables [n, blocks], which the kernel takes as int32. most_rows: of a part.
    """

    call: Callable[..., Any]
    pages: Pages
    most_rows: int
    rows: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor

    def vectors(self) -> list[torch.Tensor]:
        return [self.rows, self.starts, self.lengths, self.table]

    def placed(self, vectors: Sequence[torch.Tensor]) -> Varied:
        """Converts once, not in every layer."""
        rows, *others = vectors
        return Varied(self.call, self.pages, self.most_rows, rows, *(vector.int() for vector in others))

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """See pages.Batch; `new` is read from the slab."""
        pair, most = self.pages.pairs[layer], self.table.shape[1] * self.pages.block_size
        done: torch.Tensor = self.call(
            query.index_select(0, self.rows),
            pair[:, 0],
            pair[:, 1],
            self.starts,
            None,
            self.most_rows,
            most,
            scale=scaling,
            window_size=(-1, 0),  # causal: the last row of a part sees the whole sequence
            enable_gqa=True,
            seqused_k=self.lengths,
            block_table=self.table,
        )
        return done


class Varlen:
    """torch's varlen attention over a block table. Raises ValueError where this torch, or this format, has it not."""

    name = "varlen"
    takes_chunks = True

    def __init__(self, pages: Pages) -> None:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            raise ValueError(f"torch {torch.__version__} has no varlen_attn") from None
        if "block_table" not in inspect.signature(varlen_attn).parameters:
            raise ValueError(f"varlen_attn of torch {torch.__version__} takes no block table (that of 2.13 does)")
        if pages.scales or pages.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError("varlen_attn takes K and V in bfloat16 or float16 only")
        self._call = varlen_attn

    def batches(self, pages: Pages, parts: Parts, rows: int, width: int) -> list[Varied]:
        """See Reader."""
        starts = np.concatenate([[0], np.cumsum(parts.new)])
        each = (parts.rows, starts, parts.lengths, parts.table)
        return [Varied(self._call, pages, int(parts.new.max()), *(torch.from_numpy(part) for part in each))]
