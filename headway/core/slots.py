"""The slots of a slab: which are free, and how often each has been given out."""

from __future__ import annotations

from collections.abc import Iterable


class SlotPool:
    """Free slots and generations. A slot's generation rises each time it becomes free, so that whoever copied its bytes
    can tell whether they were still the same block's.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._is_free = bytearray(b"\1") * total
        self.generations = [0] * total

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
            self._is_free[slot] = 0
        return slots

    def give(self, slots: Iterable[int]) -> None:
        """Slots are free again. Raises ValueError on a slot that is free already."""
        for slot in slots:
            if self._is_free[slot]:
                raise ValueError(f"slot {slot} was freed twice")
            self._is_free[slot] = 1
            self.generations[slot] += 1
            self._free.append(slot)

    def free_slots(self) -> set[int]:
        return set(self._free)
