"""A mover of two child processes over the shared slabs: what raw TCP, NIXL, Mooncake and Redis have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from bench.transfer.contract import BLOCK_BYTES, Mover, Sample
from bench.transfer.process import Side
from bench.transfer.slabs import Slabs


class PairMover(Mover):
    """Source and target are child processes; the source is asked to move and measures the seconds by itself."""

    def __init__(self, slabs: Slabs) -> None:
        self.slabs = slabs
        self.setting = {}
        self.source: Side | None = None
        self.target: Side | None = None

    @abstractmethod
    def question(self, blocks: int) -> dict[str, Any]:
        """What the source is asked, beside the number of blocks."""

    def config(self, role: str) -> dict[str, Any]:
        """What every side needs to know."""
        slabs = self.slabs
        return {
            "role": role,
            "fd": slabs.source_fd if role == "source" else slabs.target_fd,
            "slab_bytes": slabs.bytes,
            "stride": slabs.stride,
            "block_bytes": BLOCK_BYTES,
            "source_slots": slabs.source_slots,
            "target_slots": slabs.target_slots,
        }

    def move(self, blocks: int) -> Sample:
        assert self.source is not None
        assert self.target is not None
        before = self.source.cpu_s, self.target.cpu_s, self.cpu_between_s()
        answer = self.source.ask(blocks=blocks, **self.question(blocks))
        after = self.source.cpu_s, self.target.cpu_s, self.cpu_between_s()
        source, target, between = (late - early for early, late in zip(before, after, strict=True))
        return Sample(answer["seconds"], source, target, between)

    def cpu_between_s(self) -> float:
        return 0.0

    def verify(self, blocks: int) -> None:
        self.slabs.clear_target()
        self.move(blocks)
        self.slabs.check_scattered(blocks)

    def close(self) -> None:
        for side in (self.source, self.target):
            if side is not None:
                side.close()
        self.source = self.target = None
