"""A source slab and a target slab: memfds whose pages all exist, with fixed random permutations as scattered slots."""

from __future__ import annotations

import os
import random

import numpy as np
import numpy.typing as npt

from bench.transfer.contract import BLOCK_BYTES, MoverError
from headway.slab.host import map_descriptor, slot_stride


class Slabs:
    """Two slabs of `slots` slots each. The movers share them, so that none has better pages than another.

    source, target: uint8 [slots, stride]. Block i of a move goes from source_slots[i] to target_slots[i].
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.stride = slot_stride(BLOCK_BYTES)
        self.bytes = slots * self.stride
        self.source_slots, self.target_slots = _permutation(slots, 1), _permutation(slots, 2)
        self.source_fd = self._make("headway-bench-source")
        self.target_fd = self._make("headway-bench-target")
        self.source = map_descriptor(self.source_fd, slots, self.stride)
        self.target = map_descriptor(self.target_fd, slots, self.stride)
        words = self.source.view(np.uint64)
        words[:] = np.random.default_rng(3).integers(0, 2**63, words.shape, np.uint64)
        self.target[:] = 0

    def _make(self, name: str) -> int:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, self.bytes)
        return descriptor

    def close(self) -> None:
        os.close(self.source_fd)
        os.close(self.target_fd)

    def clear_target(self) -> None:
        self.target[:] = 0

    def check_scattered(self, blocks: int) -> None:
        """Every moved slot has the bytes of its source, and no other slot was written."""
        for source, target in zip(self.source_slots[:blocks], self.target_slots[:blocks], strict=True):
            if not _same(self.source[source], self.target[target]):
                raise MoverError(f"slot {target} of the target differs from slot {source} of the source")
        if any(self.target[slot].any() for slot in self.target_slots[blocks:]):
            raise MoverError("a slot was written that nobody asked for")

    def check_contiguous(self, size: int) -> None:
        """The first `size` bytes are the source's."""
        if not _same(self.source.reshape(-1)[:size], self.target.reshape(-1)[:size]):
            raise MoverError(f"the first {size} bytes of the target differ from the source's")


def _same(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    return np.array_equal(one.view(np.uint64), other.view(np.uint64))


def _permutation(slots: int, seed: int) -> list[int]:
    order = list(range(slots))
    random.Random(seed).shuffle(order)
    return order
