"""Who fetches which block: one transfer a block, whoever else wants it waits for that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Flight:
    """A lease's transfer: the keys that it brings, and the leases that wait for it."""

    keys: list[bytes]
    followers: set[int] = field(default_factory=set)
    # Its own lease does not need it any more.
    abandoned: bool = False


class Flights:
    """Leases (by id) that fetch blocks (by key). A lease has at most one transfer at a time, or waits for one.

    A transfer goes on as long as anybody wants it: its own lease, or a follower.
    """

    def __init__(self) -> None:
        self._flights: dict[int, _Flight] = {}
        self._coming: dict[bytes, int] = {}
        self._follows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def has(self, lease_id: int) -> bool:
        """The lease has a transfer in the air."""
        return lease_id in self._flights

    def want(self, lease_id: int, keys: Sequence[bytes]) -> int:
        """The lease lacks `keys`, in chain order, the first of them surely.

        Returns how many of them it is to fetch now, from the first one on; 0 when the first is coming already: then
        the lease follows, and asks again when that transfer has ended (`ended` names it).
        """
        leader = self._coming.get(keys[0])
        if leader is not None:
            self._flights[leader].followers.add(lease_id)
            self._follows[lease_id] = leader
            return 0
        count = next((at for at, key in enumerate(keys) if key in self._coming), len(keys))
        flight = self._flights[lease_id] = _Flight(list(keys[:count]))
        self._coming.update(dict.fromkeys(flight.keys, lease_id))
        return count

    def ended(self, lease_id: int) -> set[int]:
        """The lease's transfer is over, well or not; the leases that waited for it."""
        flight = self._flights.pop(lease_id, None)
        if flight is None:
            return set()
        for key in flight.keys:
            del self._coming[key]
        for follower in flight.followers:
            del self._follows[follower]
        return flight.followers

    def stop(self, lease_id: int) -> int | None:
        """The lease wants nothing any more; the lease whose transfer nobody wants now, if there is one."""
        leader = self._follows.pop(lease_id, None)
        if leader is not None:
            flight = self._flights[leader]
            flight.followers.discard(lease_id)
            return leader if flight.abandoned and not flight.followers else None
        own = self._flights.get(lease_id)
        if own is None:
            return None
        own.abandoned = True
        return None if own.followers else lease_id
