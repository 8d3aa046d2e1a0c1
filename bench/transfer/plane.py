"""Headway's own planes as movers: a pull between two real kvstores, from the worker's request to its last block."""

from __future__ import annotations

import importlib.util

from bench.transfer.contract import BLOCK_BYTES, Mover, MoverError, Sample, SkipError
from bench.transfer.store_pair import StorePair
from services.kvstore.planes.nixl_agent import MODULES


class PlaneMover(Mover):
    """Blocks of a sequence that the source computed, fetched by the reader over this plane alone."""

    def __init__(self, name: str, slots: int, *flags: str) -> None:
        self.name = name
        self.setting = {"flags": list(flags)}
        self._pair = StorePair(slots, "--planes", name, *flags)

    def open(self) -> None:
        if self.name == "nixl" and not any(map(importlib.util.find_spec, MODULES)):
            raise SkipError("NIXL is not installed here (pip install .[nixl])")
        self._pair.open()

    def close(self) -> None:
        self._pair.close()

    def move(self, blocks: int) -> Sample:
        """The control messages are counted, too; sealing the sequence at the source beforehand is not."""
        keys, _ = self._pair.do(self._pair.compute(blocks))
        before = self._pair.cpu_s()
        seconds, _ = self._pair.do(self._pair.fetch(keys))
        source, reader = (late - early for early, late in zip(before, self._pair.cpu_s(), strict=True))
        return Sample(seconds, source, reader)

    def verify(self, blocks: int) -> None:
        pair = self._pair
        keys, there = pair.do(pair.compute(blocks))
        _, here = pair.do(pair.fetch(keys))
        assert pair.source.slab is not None
        assert pair.reader.slab is not None
        source, target = pair.source.slab.view, pair.reader.slab.view
        for from_slot, to_slot in zip(there, here, strict=False):
            if (source[from_slot, :BLOCK_BYTES] != target[to_slot, :BLOCK_BYTES]).any():
                raise MoverError(f"slot {to_slot} of the reader differs from slot {from_slot} of the source")
