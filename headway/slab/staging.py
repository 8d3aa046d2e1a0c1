"""Slots of a device slab to and from host memory: through two pinned buffers in turn, so that copies overlap with use.

While the caller sends (or fills) one buffer, the device copies the other one.

    outgoing   copy 0 │ use 0     │ use 1     │ use 2
                      │ copy 1    │ copy 2    │
    incoming   fill 0 │ fill 1    │ fill 2    │
                      │ copy 0    │ copy 1    │ copy 2
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headway.slab.device import CopyStream, Device

# Of one buffer: large enough that a copy's start does not matter, small enough that many connections have two each.
BUFFER_BYTES = 2 << 20


class _Buffer(NamedTuple):
    bytes: npt.NDArray[np.uint8]
    stream: CopyStream

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def views(self, count: int, size: int) -> list[memoryview]:
        """`count` views of `size` bytes, one after the other."""
        whole = self.bytes.data
        return [whole[at * size : (at + 1) * size] for at in range(count)]


class Staging:
    """Staging for the slots of one slab: `used` bytes at base + slot × stride.

    Safe from several threads: each transfer takes a pair of buffers for as long as it lasts, and pairs are kept for
    the next. There are as many as there ever were transfers at the same time.
    """

    def __init__(self, device: Device, base: int, used: int, stride: int) -> None:
        self._device = device
        self._base = base
        self._used = used
        self._stride = stride
        self._slots = max(1, BUFFER_BYTES // used)
        self._idle: list[tuple[_Buffer, _Buffer]] = []
        self._lock = threading.Lock()

    def outgoing(self, slots: Sequence[int]) -> Generator[list[memoryview], None, None]:
        """The slots' bytes in use, in order, some at a time; each list is valid until the next is asked for."""
        pieces = self._pieces(slots)
        pair = self._take()
        try:
            for piece in pieces[:1]:
                self._gather(pair[0], piece)
            for number, piece in enumerate(pieces):
                if number + 1 < len(pieces):
                    self._gather(pair[(number + 1) % 2], pieces[number + 1])
                buffer = pair[number % 2]
                buffer.stream.wait()
                yield buffer.views(len(piece), self._used)
        finally:
            self._give(pair)

    def incoming(self, slots: Sequence[int]) -> Generator[list[memoryview], None, None]:
        """As `outgoing`, to be filled. Each list is on its way into the slots once the next is asked for; when there
        is no next, all have arrived. Nothing is written to any slot after the iterator was closed.
        """
        pair = self._take()
        try:
            for number, piece in enumerate(self._pieces(slots)):
                buffer = pair[number % 2]
                buffer.stream.wait()
                yield buffer.views(len(piece), self._used)
                self._scatter(buffer, piece)
        finally:
            self._give(pair)

    def _pieces(self, slots: Sequence[int]) -> list[Sequence[int]]:
        return [slots[at : at + self._slots] for at in range(0, len(slots), self._slots)]

    def _gather(self, buffer: _Buffer, slots: Sequence[int]) -> None:
        for at, slot in enumerate(slots):
            buffer.stream.copy(buffer.address + at * self._used, self._base + slot * self._stride, self._used)

    def _scatter(self, buffer: _Buffer, slots: Sequence[int]) -> None:
        for at, slot in enumerate(slots):
            buffer.stream.copy(self._base + slot * self._stride, buffer.address + at * self._used, self._used)

    def _take(self) -> tuple[_Buffer, _Buffer]:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._buffer(), self._buffer()

    def _buffer(self) -> _Buffer:
        module = self._device.module
        return _Buffer(module.pinned(self._slots * self._used), module.stream(self._device.index))

    def _give(self, pair: tuple[_Buffer, _Buffer]) -> None:
        """Its copies are over first: whoever takes it next must not meet them."""
        for buffer in pair:
            buffer.stream.wait()
        with self._lock:
            self._idle.append(pair)
