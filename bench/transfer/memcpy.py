"""The limit of memory: scattered slots copied inside one process, by the best of one and two threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bench.report import median
from bench.transfer.contract import Mover, Sample
from bench.transfer.slabs import Slabs

THREADS = (1, 2)


class Memcpy(Mover):
    """NumPy copies of whole slots; all CPU is counted at the source, for there is only one process."""

    name = "memcpy"

    def __init__(self, slabs: Slabs) -> None:
        self.slabs = slabs
        self.threads: dict[int, int] = {}
        self.setting = {"threads": self.threads}
        self._pool: ThreadPoolExecutor | None = None

    def open(self) -> None:
        self._pool = ThreadPoolExecutor(max(THREADS))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def tune(self, sizes: list[int]) -> None:
        for blocks in sizes:
            tried = {threads: median([self._copy(blocks, threads).seconds for _ in range(3)]) for threads in THREADS}
            self.threads[blocks] = min(tried, key=lambda threads: tried[threads])

    def move(self, blocks: int) -> Sample:
        return self._copy(blocks, self.threads.get(blocks, 1))

    def verify(self, blocks: int) -> None:
        self.slabs.clear_target()
        self.move(blocks)
        self.slabs.check_scattered(blocks)

    def _copy(self, blocks: int, threads: int) -> Sample:
        assert self._pool is not None
        cpu, started = time.process_time(), time.perf_counter()
        if threads == 1:
            self._copy_share(0, blocks)
        else:
            cuts = [blocks * index // threads for index in range(threads + 1)]
            list(self._pool.map(self._copy_share, cuts[:-1], cuts[1:]))
        return Sample(time.perf_counter() - started, time.process_time() - cpu, 0.0)

    def _copy_share(self, first: int, end: int) -> None:
        slabs = self.slabs
        for index in range(first, end):
            np.copyto(slabs.target[slabs.target_slots[index]], slabs.source[slabs.source_slots[index]])
