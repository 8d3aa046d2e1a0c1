"""The row of a packed step: all chunks one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from headway.engine.contract import Chunk


class Pack(NamedTuple):
    """ids, positions: int64 [rows]. last: int64 [draws], the rows after which something is drawn, in order."""

    ids: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor


def pack(chunks: Sequence[Chunk], more: int = 0) -> Pack:
    """`more`: rows at the end that are nobody's."""
    fill = np.zeros(more, np.int64)
    ids = np.concatenate([*(np.asarray(chunk.tokens, np.int64) for chunk in chunks), fill])
    positions = np.concatenate([*(np.arange(c.position, c.position + len(c.tokens)) for c in chunks), fill])
    ends = accumulate(len(chunk.tokens) for chunk in chunks)
    last = [
        row
        for end, chunk in zip(ends, chunks, strict=True)
        if chunk.draw is not None
        for row in range(end - 1 - chunk.drafts, end)
    ]
    return Pack(torch.from_numpy(ids), torch.from_numpy(positions), torch.tensor(last, dtype=torch.int64))
