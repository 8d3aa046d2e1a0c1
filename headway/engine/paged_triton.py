"""Attention that reads the slab in place, by kernels of ours.

One program takes a tile: a few rows of one sequence, for all query heads that share one KV head, which are the rows of
its products. It walks over the sequence's tokens, finds each one's slot in the block table, and keeps a running softmax
(Milakov, Gimelshein 2018; Dao et al. 2022). Where sequences are few, each is split over several programs whose results
a second kernel puts together (flash-decoding, Dao et al. 2023). Offsets into the slab are 64-bit. What lies past the
end of a sequence is never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from headway.engine.kernels import INTERPRETED, attend_tiles, put_together
from headway.engine.paged import Parts
from headway.engine.pages import Pages

# Rows of a tile of a chunk; a step has as many as query heads share a KV head, at least what a product needs.
CHUNK_ROWS = 64
LEAST_ROWS = 16
# Of one tile of K or V, which lies in shared memory a few times over.
TILE_BYTES = 16384
# The fewest tokens that are worth a program of their own, and the most programs that share a sequence.
SPLIT_TOKENS = 128
MOST_SPLITS = 32


class Tiled(NamedTuple):
    """Parts, cut into tiles of at most `tile_rows` rows of the pack. rows: int64 [n] of the pack, or None where all are
    there in their order. table: int64 [parts, blocks]. tiles: int64 [5, tiles]: row of the table, first row in the
    pack, first row of the result, rows, position of the first row. splits: programs that share a tile.
    """

    pages: Pages
    rows: torch.Tensor | None
    table: torch.Tensor
    tiles: torch.Tensor
    tile_rows: int
    splits: int

    def vectors(self) -> list[torch.Tensor]:
        return [self.table, self.tiles, *([] if self.rows is None else [self.rows])]

    def placed(self, vectors: Sequence[torch.Tensor]) -> Tiled:
        table, tiles, *rows = vectors
        return self._replace(table=table, tiles=tiles, rows=rows[0] if rows else None)

    def attend(self, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """See pages.Batch; `new` is read from the slab. The last axis of query is contiguous."""
        pages = self.pages
        rows, (heads, dim) = len(query) if self.rows is None else len(self.rows), query.shape[1:]
        out = query.new_empty((rows, heads, dim))
        parts, sums = out, out
        if self.splits > 1:
            parts = query.new_empty((self.splits, rows, heads, dim), dtype=torch.float32)
            sums = query.new_empty((self.splits, rows, heads), dtype=torch.float32)
        key, value = pages.pairs[layer].unbind(1)
        key_scales, value_scales = pages.scales[layer].unbind(1) if pages.scales else (key, value)
        group, wide = heads // pages.heads, max(16, _power(dim))
        grid = (self.tiles.shape[1], pages.heads, self.splits)
        launch: Any = attend_tiles
        launch[grid](
            query, key, value, key_scales, value_scales, self.table, self.tiles, parts, sums,
            (scaling or dim**-0.5) * 1.4426950408889634,
            self.tiles.shape[1], self.table.shape[1], rows, query.stride(0), query.stride(1),
            *key.stride()[:3], *(key_scales.stride()[:2] if pages.scales else (0, 0)),
            GROUP=group, DIM=dim, SIZE=pages.block_size, ROWS=_rows(self.tile_rows * group),
            TOKENS=_tokens(wide * pages.dtype.itemsize), WIDE=wide, SPLITS=self.splits, SCALED=bool(pages.scales),
            EXACT=pages.dtype == torch.float32 or INTERPRETED,
        )  # fmt: skip
        if self.splits > 1:
            launch = put_together
            launch[(rows * heads,)](parts, sums, out, rows * heads, DIM=dim, WIDE=wide, SPLITS=self.splits)
        return out


class InPlace:
    """The reader. processors: multiprocessors of the device, by which sequences are split. heads: query heads."""

    name = "triton"
    takes_chunks = True

    def __init__(self, pages: Pages, heads: int, processors: int) -> None:
        self._group, self._processors = heads // pages.heads, processors

    def batches(self, pages: Pages, parts: Parts, rows: int, width: int) -> list[Tiled]:
        """See Reader."""
        table, mine = torch.from_numpy(parts.table), parts.rows
        some = None if len(mine) == rows else torch.from_numpy(mine)
        if (parts.new == 1).all():
            splits = self._splits(len(mine) * pages.heads, table.shape[1] * pages.block_size)
            return [Tiled(pages, some, table, _tiles(parts, 1), 1, splits)]
        most = max(1, CHUNK_ROWS // self._group)
        return [Tiled(pages, some, table, _tiles(parts, most), most, 1)]

    def _splits(self, programs: int, tokens: int) -> int:
        """A power of two: each processor gets about two programs. From shapes only, which a graph has, not lengths."""
        wanted = min(MOST_SPLITS, 2 * self._processors // programs, tokens // SPLIT_TOKENS)
        return 1 << (max(1, wanted).bit_length() - 1)


def _tiles(parts: Parts, most: int) -> torch.Tensor:
    """See Tiled."""
    tiles = -(-parts.new // most)  # of each part
    sequence = np.repeat(np.arange(len(tiles)), tiles)
    at = most * (np.arange(len(sequence)) - (np.cumsum(tiles) - tiles)[sequence])
    new, target = parts.new[sequence], (np.cumsum(parts.new) - parts.new)[sequence]
    position = parts.lengths[sequence] - new + at
    rows = parts.row[sequence] + at
    return torch.from_numpy(np.stack([sequence, rows, target + at, np.minimum(most, new - at), position]))


def _rows(count: int) -> int:
    return max(LEAST_ROWS, _power(count))


def _tokens(row_bytes: int) -> int:
    return max(16, min(64, TILE_BYTES // row_bytes))


def _power(count: int) -> int:
    """Of two, the next."""
    return 1 << (count - 1).bit_length()
