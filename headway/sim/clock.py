"""Virtual time: events in the order of their time, those of one time in the order of their making."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """`now_s` is the time of the event that runs."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._made = 0

    def at(self, time_s: float, action: Callable[[], object]) -> None:
        """Run `action` at `time_s`, at the earliest now."""
        self._made += 1
        heapq.heappush(self._events, (max(time_s, self.now_s), self._made, action))

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self.at(self.now_s + seconds, action)

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
