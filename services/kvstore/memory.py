"""The slab as planes see it: bytes of slots, and the generations that tell whether they still are what they were."""

from __future__ import annotations

import ctypes
import mmap
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence

import xxhash

from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool

# Not in the slab: bytes that every store can give before it has any block, and where they land.
PROBE_SLOT = 0xFFFFFFFF
LANDING_SLOT = 0xFFFFFFFE

Pieces = Generator[list[memoryview], None, None]


class Memory(ABC):
    """What planes ask of any slab, from their threads, while the event loop changes generations.

    Not usable before `lay_out`. `lasting`: what `outgoing` gives stays valid, as it is the slab itself.
    """

    lasting = False

    def __init__(self) -> None:
        self.stride = 0
        self._pool = SlotPool(ForgetfulRecords(0))
        self._probe = self._landing = memoryview(b"")
        self.slot_bytes = 0

    def lay_out(self, slot_bytes: int, stride: int, pool: SlotPool) -> None:
        self.slot_bytes, self.stride, self._pool = slot_bytes, stride, pool
        self._probe = memoryview(bytearray(b"headway " * (slot_bytes // 8 + 1))[:slot_bytes])
        self._landing = memoryview(bytearray(slot_bytes))

    @abstractmethod
    def outgoing(self, slots: Sequence[int]) -> Pieces:
        """The slots' bytes in use, in order, in one or more lists; each is valid until the next is asked for.

        The slots are those of the layout of now, whenever the pieces are asked for.
        """

    @abstractmethod
    def incoming(self, slots: Sequence[int]) -> Pieces:
        """As `outgoing`, to be filled. Each list may be read until the next is asked for; when there is no next, all
        bytes are in the slab. Nothing is written to it once the iterator is closed: close it, whatever happens.
        """

    def has(self, slot: int) -> bool:
        return slot < self._pool.total or slot == PROBE_SLOT

    @property
    def slots(self) -> int:
        return self._pool.total

    def current(self, slot: int, generation: int) -> bool:
        """The slot has not been given out anew since it had this generation."""
        return slot == PROBE_SLOT or self._pool.generations[slot] == generation

    def generation(self, slot: int) -> int:
        return self._pool.generations[slot]

    def checksums(self, slots: Sequence[int]) -> list[int]:
        """xxh3_64 of each slot's bytes in use."""
        return [xxhash.xxh3_64_intdigest(view) for views in self.outgoing(slots) for view in views]

    def checksum(self, slot: int) -> int:
        return self.checksums([slot])[0]


class SlabMemory(Memory):
    """A slab in host memory: planes read from and write to the mapped slab itself."""

    lasting = True

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__()
        # All pages exist already: this only fills the page table.
        self._map = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes = memoryview(self._map)

    def view(self, slot: int) -> memoryview:
        """The slot's bytes in use, writable."""
        if slot == PROBE_SLOT:
            return self._probe
        if slot == LANDING_SLOT:
            return self._landing
        start = slot * self.stride
        return self._bytes[start : start + self.slot_bytes]

    def address(self, slot: int) -> int:
        """Where the slot begins in this process; slots of the slab lie `stride` bytes apart."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.view(slot)))

    def outgoing(self, slots: Sequence[int]) -> Pieces:
        return _at_once([self.view(slot) for slot in slots])

    def incoming(self, slots: Sequence[int]) -> Pieces:
        return _at_once([self.view(slot) for slot in slots])


def _at_once(views: list[memoryview]) -> Pieces:
    yield views
