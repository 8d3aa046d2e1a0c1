"""What must outlive the process that keeps a slab's accounts: of each slot its state, its generation, and its block."""

from __future__ import annotations

from typing import Protocol

FREE, TAKEN, SEALED = 0, 1, 2


class Cells(Protocol):
    """One number a slot."""

    def __len__(self) -> int: ...
    def __getitem__(self, slot: int, /) -> int: ...
    def __setitem__(self, slot: int, value: int, /) -> None: ...


class Records(Protocol):
    """Written as things happen; whatever moment the process dies at, what it reads back must be safe to go on with.

    states: FREE, TAKEN (somebody may be writing) or SEALED (holds a block, completely written), one a slot.
    """

    @property
    def states(self) -> Cells: ...

    @property
    def generations(self) -> Cells: ...

    def seal(self, slot: int, key: bytes, parent: int | None) -> None:
        """The slot holds this block; `parent`: the slot of the block before it, None at the root."""
        ...

    def block(self, slot: int) -> tuple[bytes, int | None]:
        """Key and parent's slot of a SEALED slot."""
        ...


class ForgetfulRecords:
    """Records that end with the process."""

    def __init__(self, slots: int) -> None:
        self.states = bytearray(slots)
        self.generations = [0] * slots
        self._blocks: dict[int, tuple[bytes, int | None]] = {}

    def seal(self, slot: int, key: bytes, parent: int | None) -> None:
        self._blocks[slot] = (key, parent)
        self.states[slot] = SEALED

    def block(self, slot: int) -> tuple[bytes, int | None]:
        return self._blocks[slot]
