"""Who waits for slots: oldest first, and nobody overtakes."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from headway.core.instructions import Reply
from headway.core.leases import Lease, Refused, Source


@dataclass(slots=True, eq=False)
class Waiter:
    """An acquire or (with `lease`) an extension that waits for slots. Oldest first."""

    session: str
    operation_id: int
    arrival_s: float
    number: int
    deadline_s: float
    keys: list[bytes]
    tokens: int
    blocks: int
    joiner: str = ""
    lease: Lease | None = None
    request: tuple[str, int] = ("", 0)
    source: Source | None = None

    @property
    def age(self) -> tuple[float, int]:
        return (self.arrival_s, self.lease.lease_id if self.lease else self.number)


class WaitQueue:
    """Waiters by age."""

    def __init__(self) -> None:
        self._waiters: list[Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def oldest(self) -> Waiter | None:
        return self._waiters[0] if self._waiters else None

    def add(self, waiter: Waiter) -> None:
        bisect.insort(self._waiters, waiter, key=lambda w: w.age)

    def remove(self, waiter: Waiter) -> None:
        self._waiters.remove(waiter)

    def forget(self, session: str) -> None:
        """The session is gone: it gets no replies."""
        self._waiters = [waiter for waiter in self._waiters if waiter.session != session]

    def refuse(self, which: Callable[[Waiter], bool], refused: Refused) -> list[Reply]:
        """Take out those that `which` says yes of; the replies that they get."""
        out = [waiter for waiter in self._waiters if which(waiter)]
        self._waiters = [waiter for waiter in self._waiters if not which(waiter)]
        return [Reply(waiter.session, waiter.operation_id, refused) for waiter in out]
