"""What a request waits for: events of the workers that serve it, timers, its deadline. One queue a request, bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from headway.runtime.errors import HeadwayError

if TYPE_CHECKING:
    from services.router.choice import Choice
    from services.router.fleet import Worker


# By so much, at most, uvloop's timers come early: it counts in whole milliseconds, from the last one that it looked at.
EARLY_S = 0.002


class Gone:
    """The event that a worker's streams broke."""


GONE = Gone()


class Item(NamedTuple):
    """`event` is a PrefillEvent, a DecodeEvent or GONE, of `worker` about `choice`."""

    choice: Choice
    worker: Worker
    event: Any


class Inbox:
    """Items for one waiting task. When it overflows, `on_error` is called and `check` raises."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: list[Item] = []
        self._error: HeadwayError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._poked = False
        self.on_error: Callable[[], None] = lambda: None

    def put(self, choice: Choice, worker: Worker, event: Any) -> None:
        """Add an event; one too many ends the request."""
        if self._error is not None:
            return
        if len(self._items) >= self._limit:
            message = f"the client does not read: {self._limit} messages wait for it; read the stream as it comes"
            self.fail(HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, message))
            return
        self._items.append(Item(choice, worker, event))
        self._wake()

    def fail(self, error: HeadwayError) -> None:
        """End the request with this error."""
        if self._error is None:
            self._error = error
            self._items.clear()
            self.on_error()

    def poke(self) -> None:
        """Let `take` return, though nothing may have come."""
        self._poked = True
        self._wake()

    def poke_after(self, seconds: float) -> asyncio.TimerHandle:
        """`poke` when that time is over, and never before."""
        return asyncio.get_running_loop().call_later(seconds + EARLY_S, self.poke)

    async def take(self) -> list[Item]:
        """All that came since, at once; waits for something."""
        while not (self._items or self._poked):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._poked = False
        items, self._items = self._items, []
        return items

    def check(self) -> None:
        """Raise the error that ended the request, if any."""
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
