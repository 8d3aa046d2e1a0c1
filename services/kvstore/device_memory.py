"""A slab on a device, for planes that move host bytes: its slots come and go through pinned staging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from headway.core.slots import SlotPool
from headway.slab.device import DeviceSegment
from headway.slab.staging import Staging
from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT, Memory, Pieces


class DeviceMemory(Memory):
    """See Memory. The probe never touches the device: what it measures is the way between the hosts."""

    def __init__(self, segment: DeviceSegment) -> None:
        super().__init__()
        self.segment = segment
        self._staging: Staging | None = None

    def lay_out(self, slot_bytes: int, stride: int, pool: SlotPool) -> None:
        super().lay_out(slot_bytes, stride, pool)
        self._staging = Staging(self.segment.device, self.segment.address, slot_bytes, stride)

    def address(self, slot: int) -> int:
        """Where the slot begins on the device."""
        return self.segment.address + slot * self.stride

    def outgoing(self, slots: Sequence[int]) -> Pieces:
        return self._pieces(slots, self._staged.outgoing)

    def incoming(self, slots: Sequence[int]) -> Pieces:
        return self._pieces(slots, self._staged.incoming)

    def _pieces(self, slots: Sequence[int], staged: Callable[[Sequence[int]], Pieces]) -> Pieces:
        for outside, run in _runs(slots):
            if outside:
                yield [self._outside(slot) for slot in run]
            else:
                yield from staged(run)

    @property
    def _staged(self) -> Staging:
        assert self._staging is not None
        return self._staging

    def _outside(self, slot: int) -> memoryview:
        return self._probe if slot == PROBE_SLOT else self._landing


def _runs(slots: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
    """Slots of the slab, and those that lie outside of it, apart: what a peer asks for may hold both."""
    for outside, run in groupby(slots, key=lambda slot: slot in (PROBE_SLOT, LANDING_SLOT)):
        yield outside, list(run)
