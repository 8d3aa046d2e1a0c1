"""Block events: what a store tells the routers, numbered without a gap, the last ones kept."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class BlockEvent(NamedTuple):
    """`keys` were stored (in chain order, the first one's parent is `parent`) or, with `removed`, are gone."""

    number: int
    keys: list[bytes]
    parent: bytes
    removed: bool


class BlockEvents:
    """A bounded log. Whoever is further behind than it reaches needs a snapshot."""

    def __init__(self, keep: int = 8192) -> None:
        self._events: deque[BlockEvent] = deque(maxlen=keep)
        self.last = 0

    def stored(self, keys: list[bytes], parent: bytes) -> None:
        self._append(keys, parent, removed=False)

    def removed(self, keys: list[bytes]) -> None:
        self._append(keys, b"", removed=True)

    def since(self, number: int) -> list[BlockEvent] | None:
        """The events after `number`; None when some of them are no longer kept (or never were)."""
        missing = self.last - number
        if missing < 0 or missing > len(self._events):
            return None
        return list(self._events)[len(self._events) - missing :] if missing else []

    def _append(self, keys: list[bytes], parent: bytes, *, removed: bool) -> None:
        self.last += 1
        self._events.append(BlockEvent(self.last, keys, parent, removed))
