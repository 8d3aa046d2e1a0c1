"""Block events: what a store tells the routers, numbered without a gap, the last ones kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple


class BlockEvent(NamedTuple):
    """`keys` were stored (parents before children) or, with `removed`, are gone (children first).

    Events `first` to `last` in one: those that follow each other and are of one kind can be merged.
    """

    first: int
    last: int
    keys: list[bytes]
    removed: bool


def merge(events: Iterable[BlockEvent], most_keys: int) -> list[BlockEvent]:
    """The same events in as few as possible, each of at most `most_keys` keys unless it had more before."""
    merged: list[BlockEvent] = []
    for event in events:
        last = merged[-1] if merged else None
        if last and last.removed == event.removed and len(last.keys) + len(event.keys) <= most_keys:
            merged[-1] = BlockEvent(last.first, event.last, last.keys + event.keys, event.removed)
        else:
            merged.append(event)
    return merged


class BlockEvents:
    """A log of the last events, together at most `keep` keys. Whoever is further behind needs a snapshot."""

    def __init__(self, keep: int = 1 << 16) -> None:
        self._events: deque[BlockEvent] = deque()
        self._keep = keep
        self._kept = 0
        self.last = 0

    def stored(self, keys: list[bytes]) -> None:
        self._append(keys, removed=False)

    def removed(self, keys: list[bytes]) -> None:
        self._append(keys, removed=True)

    def since(self, number: int) -> list[BlockEvent] | None:
        """The events after `number`; None when some of them are no longer kept (or never were)."""
        missing = self.last - number
        if missing < 0 or missing > len(self._events):
            return None
        return list(islice(reversed(self._events), missing))[::-1]

    def _append(self, keys: list[bytes], *, removed: bool) -> None:
        self.last += 1
        self._events.append(BlockEvent(self.last, self.last, keys, removed))
        self._kept += len(keys)
        while self._kept > self._keep:
            self._kept -= len(self._events.popleft().keys)
