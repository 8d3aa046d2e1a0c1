"""Run streams: commands of one router in, one message of events per engine step out."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from headway.core.sequence import Sequence
from headway.runtime.channels import ROUTER_ID
from headway.v1 import common_pb2
from headway.worker.active import Active
from headway.worker.loop import EngineLoop

log = logging.getLogger(__name__)

Command = TypeVar("Command")
Command_co = TypeVar("Command_co", covariant=True)
Event = TypeVar("Event")


class Request(Protocol[Command_co]):
    """A message of a Run stream."""

    @property
    def commands(self) -> Iterable[Command_co]: ...


def router_of(context: Any) -> str:
    """The id of the router that calls Run; a caller that gives none is a router of its own."""
    for key, value in context.invocation_metadata() or ():
        if key == ROUTER_ID:
            return str(value)
    return uuid.uuid4().hex


# A router that does not read for so long is as good as gone.
MAX_EVENTS = 65536


class RunStream(Generic[Event]):
    """The sequences of one router, and the events that wait to be sent to it."""

    def __init__(self, loop: EngineLoop, router_id: str) -> None:
        self.loop = loop
        self.router_id = router_id
        self.actives: dict[tuple[str, int], Active] = {}
        self._events: list[Event] = []
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        """Send with all else of this loop tick."""
        self._events.append(event)
        if len(self._events) > MAX_EVENTS:
            self._closed = True
        self._wake.set()

    def forget(self, sequence: Sequence) -> None:
        self.actives.pop((sequence.sequence_id, sequence.attempt), None)

    def cancel(self, command: common_pb2.CancelSequence) -> None:
        """Stop the sequence, wherever it stands; an unknown one is ignored."""
        active = self.actives.pop((command.sequence_id, command.attempt), None)
        if active is not None:
            self.loop.cancel(active)
        self.loop.leases.release_handed_off(command.sequence_id, command.attempt)

    async def serve(
        self, requests: AsyncIterator[Request[Command]], handle: Callable[[Command], None]
    ) -> AsyncIterator[list[Event]]:
        """Handle commands as they come and yield events in batches, until the router ends the stream or breaks it.

        All sequences that are left then are cancelled.
        """
        reader = asyncio.create_task(self._read(requests, handle))
        try:
            while not self._closed:
                await self._wake.wait()
                self._wake.clear()
                if self._events:
                    events, self._events = self._events, []
                    yield events
        finally:
            reader.cancel()
            for active in list(self.actives.values()):
                self.loop.cancel(active)
            self.actives.clear()

    async def _read(self, requests: AsyncIterator[Request[Command]], handle: Callable[[Command], None]) -> None:
        try:
            async for request in requests:
                for command in request.commands:
                    handle(command)
        except Exception:
            log.exception("event=run_stream_failed")
        finally:
            self._closed = True
            self._wake.set()
