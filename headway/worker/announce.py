"""Announce a worker to its routers: the card first, then its status every half second and after changes of load,
at once after another router's prompt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc

from headway.runtime.channels import open_channel
from headway.v1 import router_pb2, router_pb2_grpc
from headway.worker.loop import EngineLoop
from headway.worker.status import worker_status

log = logging.getLogger(__name__)

STATUS_S = 0.5
# Between two status messages, however often the load changes; and where another router's prompt has come.
LEAST_S, HURRY_S = 0.15, 0.03
RECONNECT_S = 0.2


class Announcer:
    """One stream to each router, renewed for ever. Announces only while the worker is attached to its kvstore."""

    def __init__(self, routers: tuple[str, ...], loop: EngineLoop, hello: Callable[[], router_pb2.WorkerHello]) -> None:
        self._routers = [_Router(address) for address in routers]
        self._loop = loop
        self._hello = hello
        self._draining = False

    def load_changed(self) -> None:
        for router in self._routers:
            router.changed.set()

    def prompt_came(self, router_id: str) -> None:
        """A router sent a prompt: the others hear of it at once, or the next one of each would be sent here as well."""
        for router in self._routers:
            if router.router_id != router_id:
                router.changed.set()
                router.hurry.set()

    def drain(self) -> None:
        """Tell the routers to send no new work."""
        self._draining = True
        self.load_changed()

    async def run(self) -> None:
        await asyncio.gather(*map(self._to, self._routers))

    async def _to(self, router: _Router) -> None:
        while True:
            try:
                await self._announce(router)
            except grpc.aio.AioRpcError as error:
                log.info("router=%s event=announce_ended code=%s", router.address, error.code().name)
            await asyncio.sleep(RECONNECT_S)

    async def _announce(self, router: _Router) -> None:
        while self._loop.slab is None:
            await router.changed.wait()
            router.changed.clear()
        async with open_channel(router.address) as channel:
            call = router_pb2_grpc.RouterServiceStub(channel).Announce(self._messages(router))
            async for response in call:
                router.router_id = response.router_id
                log.info("router=%s id=%s event=announced", router.address, response.router_id)

    async def _messages(self, router: _Router) -> AsyncIterator[router_pb2.AnnounceRequest]:
        yield router_pb2.AnnounceRequest(hello=self._hello())
        said_draining = False
        while True:
            yield router_pb2.AnnounceRequest(status=worker_status(self._loop, router.router_id))
            if self._draining and not said_draining:
                said_draining = True
                yield router_pb2.AnnounceRequest(draining=router_pb2.Draining())
            await _within(STATUS_S - LEAST_S, router.changed)
            # Not at once: a change of load is the very moment in which a sequence is being handed over.
            await asyncio.sleep(HURRY_S)
            await _within(LEAST_S - HURRY_S, router.hurry)
            router.changed.clear()
            router.hurry.clear()


@dataclass(slots=True)
class _Router:
    """Who hears an announcement. `router_id` is empty until it has said so."""

    address: str
    router_id: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Until the event, but no longer than that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
