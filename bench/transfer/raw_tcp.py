"""The limit of TCP on loopback: contiguous and touched buffers, 1, 2 or 4 connections, 256 KiB to 4 MiB a call.

Two pairs of processes are tried: socket buffers that the kernel tunes, and fixed ones of 4 MiB. The best stays.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any, NamedTuple

from bench.report import median
from bench.transfer.contract import BLOCK_BYTES, Sample
from bench.transfer.pair import PairMover
from bench.transfer.process import Side
from bench.transfer.slabs import Slabs

CONNECTIONS = (1, 2, 4)
PIECES = (256 << 10, 1 << 20, 4 << 20)
BUFFERS = (0, 4 << 20)  # bytes asked for; 0: tuned by the kernel
FINALISTS = 3


class Setting(NamedTuple):
    """Connections, bytes a call, and bytes of socket buffer (0: the kernel's choice)."""

    connections: int
    piece: int
    buffer: int


class RawTcp(PairMover):
    """Sends from the beginning of the source slab into the beginning of the target slab; nothing is scattered."""

    name = "raw_tcp"

    def __init__(self, slabs: Slabs) -> None:
        super().__init__(slabs)
        self.pairs: dict[int, tuple[Side, Side]] = {}
        self.best: dict[int, Setting] = {}
        self.current = Setting(1, 1 << 20, 0)

    def open(self) -> None:
        for buffer in BUFFERS:
            target = Side(sys.executable, "raw_tcp", self.config("target") | {"buffer": buffer}, [self.slabs.target_fd])
            self.pairs[buffer] = (target, target)
            target.answer()
            config = self.config("source") | {"buffer": buffer, "port": target.ask()["port"]}
            source = Side(sys.executable, "raw_tcp", config, [self.slabs.source_fd])
            self.pairs[buffer] = (source, target)
            source.answer()

    def close(self) -> None:
        for pair in self.pairs.values():
            for side in set(pair):
                side.close()
        self.pairs = {}

    def tune(self, sizes: list[int]) -> None:
        """All settings once after one warm-up; the best few three times more; the best of these."""
        for blocks in sizes:
            everything = [Setting(*each) for each in itertools.product(CONNECTIONS, PIECES, BUFFERS)]
            first = {setting: min(self._timed(setting, blocks, 2)) for setting in everything}
            finalists = sorted(first, key=lambda setting: first[setting])[:FINALISTS]
            final = {setting: median(self._timed(setting, blocks, 3)) for setting in finalists}
            self.best[blocks] = min(final, key=lambda setting: final[setting])
        self.setting = {str(blocks): setting._asdict() for blocks, setting in self.best.items()}

    def _timed(self, setting: Setting, blocks: int, repeats: int) -> list[float]:
        return [self._move(setting, blocks).seconds for _ in range(repeats)]

    def question(self, blocks: int) -> dict[str, Any]:
        size, setting = blocks * BLOCK_BYTES, self.current
        return {"bytes": size, "connections": setting.connections, "piece": setting.piece}

    def move(self, blocks: int) -> Sample:
        return self._move(self.best.get(blocks, self.current), blocks)

    def _move(self, setting: Setting, blocks: int) -> Sample:
        self.current = setting
        self.source, self.target = self.pairs[setting.buffer]
        return super().move(blocks)

    def verify(self, blocks: int) -> None:
        self.slabs.clear_target()
        self.move(blocks)
        self.slabs.check_contiguous(blocks * BLOCK_BYTES)
