"""What everything that moves blocks has in common, so that limits, peers and Headway's planes take turns in one run.

A mover copies the content of N scattered slots of a source slab into N scattered slots of a target slab. The two slabs
belong to two processes (memcpy and iperf3 say where they differ). Blocks are SmolLM2's: 16 tokens are 737,280 bytes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

BLOCK_TOKENS = 16
BLOCK_BYTES = 737_280


class SkipError(Exception):
    """This mover cannot run here; one sentence with the reason."""


class MoverError(Exception):
    """A mover that should have worked did not: wrong bytes, a dead process, no answer in time."""


@dataclass(frozen=True)
class Sample:
    """One move: seconds of wall time until the source knows that all bytes are there, CPU seconds of each process."""

    seconds: float
    cpu_source_s: float
    cpu_target_s: float
    cpu_between_s: float = 0.0  # of a server that stands between the two


class Mover(ABC):
    """One way of moving blocks. Entered once, then asked for moves of several sizes; leaves nothing running.

    `setting` is what goes into the result: the options in use and how they were chosen.
    """

    name: str
    setting: dict[str, Any]
    quick: bool = False  # try fewer settings
    least_blocks: int = 1  # smaller moves mean nothing to it

    @abstractmethod
    def open(self) -> None:
        """Start what is needed. Raises SkipError where it is not installed or cannot run here."""

    @abstractmethod
    def close(self) -> None:
        """End all that `open` started; safe to call after a failed `open`, and twice."""

    @abstractmethod
    def move(self, blocks: int) -> Sample:
        """Move `blocks` blocks once. Raises MoverError."""

    def tune(self, sizes: list[int]) -> None:  # noqa: B027 (not all movers have something to try)
        """Choose the best setting for moves of these numbers of blocks; may take some seconds a size."""

    @abstractmethod
    def verify(self, blocks: int) -> None:
        """Move `blocks` blocks into slots that were cleared before. Raises MoverError unless the bytes are right."""

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def process_cpu_s(pid: int) -> float:
    """User and system CPU seconds of a live process, of all its threads, by the kernel's process clock."""
    return time.clock_gettime((~pid << 3) | 2)
