"""Announce a worker to its routers: the card first, then its status every half second and after changes of load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from headway.runtime.channels import open_channel
from headway.v1 import router_pb2, router_pb2_grpc
from headway.worker.loop import EngineLoop
from headway.worker.status import worker_status

log = logging.getLogger(__name__)

STATUS_S = 0.5
# Between two status messages, however often the load changes.
LEAST_S = 0.05
RECONNECT_S = 0.2


class Announcer:
    """One stream to each router, renewed for ever. Announces only while the worker is attached to its kvstore."""

    def __init__(self, routers: tuple[str, ...], loop: EngineLoop, hello: Callable[[], router_pb2.WorkerHello]) -> None:
        self._routers = routers
        self._loop = loop
        self._hello = hello
        self._changed = [asyncio.Event() for _ in routers]
        self._draining = False

    def load_changed(self) -> None:
        for event in self._changed:
            event.set()

    def drain(self) -> None:
        """Tell the routers to send no new work."""
        self._draining = True
        self.load_changed()

    async def run(self) -> None:
        await asyncio.gather(
            *(self._to(router, event) for router, event in zip(self._routers, self._changed, strict=True))
        )

    async def _to(self, router: str, changed: asyncio.Event) -> None:
        while True:
            try:
                await self._announce(router, changed)
            except grpc.aio.AioRpcError as error:
                log.info("router=%s event=announce_ended code=%s", router, error.code().name)
            await asyncio.sleep(RECONNECT_S)

    async def _announce(self, router: str, changed: asyncio.Event) -> None:
        while self._loop.slab is None:
            await changed.wait()
            changed.clear()
        known = _Router()
        async with open_channel(router) as channel:
            call = router_pb2_grpc.RouterServiceStub(channel).Announce(self._messages(known, changed))
            async for response in call:
                known.router_id = response.router_id
                log.info("router=%s id=%s event=announced", router, response.router_id)

    async def _messages(self, known: _Router, changed: asyncio.Event) -> AsyncIterator[router_pb2.AnnounceRequest]:
        yield router_pb2.AnnounceRequest(hello=self._hello())
        said_draining = False
        while True:
            yield router_pb2.AnnounceRequest(status=worker_status(self._loop, known.router_id))
            if self._draining and not said_draining:
                said_draining = True
                yield router_pb2.AnnounceRequest(draining=router_pb2.Draining())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_S - LEAST_S):
                    await changed.wait()
            # Not at once: a change of load is the very moment in which a sequence is being handed over.
            await asyncio.sleep(LEAST_S)
            changed.clear()


@dataclass(slots=True)
class _Router:
    """Who hears this announcement; empty until it has said so."""

    router_id: str = ""
