"""The slots of a slab: which are free, and how often each has been given out."""

from __future__ import annotations

from collections.abc import Iterable

from headway.core.records import FREE, TAKEN, Cells, Records


class SlotPool:
    """Free slots and generations. A slot's generation rises each time it becomes free, so that whoever copied its bytes
    can tell whether they were still the same block's.
    """

    def __init__(self, records: Records) -> None:
        self._states = records.states
        self.generations: Cells = records.generations
        self.total = len(records.states)
        self._free = [slot for slot in range(self.total - 1, -1, -1) if records.states[slot] == FREE]

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free slots. Raises ValueError when there are fewer."""
        if count > len(self._free):
            raise ValueError(f"{count} slots asked for, {len(self._free)} free")
        cut = len(self._free) - count
        slots = self._free[cut:]
        del self._free[cut:]
        for slot in slots:
            self._states[slot] = TAKEN
        return slots

    def give(self, slots: Iterable[int]) -> None:
        """Slots are free again. Raises ValueError on a slot that is free already."""
        for slot in slots:
            if self._states[slot] == FREE:
                raise ValueError(f"slot {slot} was freed twice")
            self.generations[slot] += 1
            self._states[slot] = FREE
            self._free.append(slot)

    def free_slots(self) -> set[int]:
        return set(self._free)
