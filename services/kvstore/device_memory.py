"""A slab on a device, for planes that move host bytes: its slots come and go through pinned staging."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from headway.core.slots import SlotPool
from headway.slab.device import DeviceSegment
from headway.slab.staging import Staging
from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT, Memory, Pieces

# A whole allocation of the driver's, so that its handle leads to nothing else.
LEAST_BYTES = 2 << 20


class DeviceMemory(Memory):
    """See Memory. Planes that move host bytes are probed without the device: what counts is the way between hosts."""

    def __init__(self, segment: DeviceSegment) -> None:
        super().__init__()
        self.segment = segment
        self._staging: Staging | None = None
        self._outer: DeviceSegment | None = None
        self._lock = threading.Lock()

    def lay_out(self, slot_bytes: int, stride: int, pool: SlotPool) -> None:
        super().lay_out(slot_bytes, stride, pool)
        self._staging = Staging(self.segment.device, self.segment.address, slot_bytes, stride)

    @property
    def outer(self) -> DeviceSegment:
        """On the device, for planes that copy there by themselves: a slot that a probe reads, then one where it lands.

        Made when it is first asked for. Raises SlabError.
        """
        size = max(LEAST_BYTES, 2 * self.slot_bytes)
        with self._lock:
            if self._outer is not None and self._outer.size != size:
                self._outer.remove()
                self._outer = None
            if self._outer is None:
                self._outer = DeviceSegment(self.segment.device, size)
                self._copy(self._outer.address, self._probe, to_device=True)
            return self._outer

    def address(self, slot: int) -> int:
        """Where the slot begins on the device; PROBE_SLOT and LANDING_SLOT lie in `outer`."""
        if slot in (PROBE_SLOT, LANDING_SLOT):
            return self.outer.address + (self.slot_bytes if slot == LANDING_SLOT else 0)
        return self.segment.address + slot * self.stride

    def look_at_landing(self) -> None:
        """A plane has copied to LANDING_SLOT on the device: bring it to where `checksum` sees it."""
        self._copy(self.address(LANDING_SLOT), self._landing, to_device=False)

    def _copy(self, address: int, host: memoryview, *, to_device: bool) -> None:
        device = self.segment.device
        staged, stream = device.module.pinned(len(host)), device.module.stream(device.index)
        if to_device:
            staged.data[:] = host
        addresses = (address, staged.ctypes.data) if to_device else (staged.ctypes.data, address)
        stream.copy(*addresses, len(host))
        stream.wait()
        if not to_device:
            host[:] = staged.data

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
