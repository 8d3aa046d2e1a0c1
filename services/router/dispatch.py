"""The Run stream to one worker: commands of many requests out, their events back in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from headway.runtime.channels import ROUTER_ID, open_channel
from headway.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

if TYPE_CHECKING:
    from services.router.choice import Choice

log = logging.getLogger(__name__)

# Commands that wait because the worker does not read; such a worker is as good as gone.
MAX_PENDING = 65536
# A message costs either side about 85 µs, whatever is in it.
SOON_S = 0.002


class Plane(NamedTuple):
    """The message types of one kind of worker."""

    stub: Callable[[grpc.aio.Channel], Any]
    command: Callable[..., Any]
    request: Callable[..., Any]


PREFILL = Plane(prefill_pb2_grpc.PrefillServiceStub, prefill_pb2.PrefillCommand, prefill_pb2.PrefillServiceRunRequest)
DECODE = Plane(decode_pb2_grpc.DecodeServiceStub, decode_pb2.DecodeCommand, decode_pb2.DecodeServiceRunRequest)


class Link:
    """One long-lived Run stream. All commands of a loop tick leave in one message; nothing waits above 2 ms.

    Events go to the choice that is registered for their sequence; others are dropped. When the stream ends, for
    whatever reason, `on_broken` is called once and the link is of no more use.
    """

    def __init__(
        self,
        address: str,
        plane: Plane,
        router_id: str,
        on_event: Callable[[Choice, Any], None],
        on_broken: Callable[[], None],
    ) -> None:
        self.address = address
        self.routes: dict[str, Choice] = {}
        self._plane = plane
        self._router_id = router_id
        self._on_event = on_event
        self._on_broken = on_broken
        self._pending: list[Any] = []
        self._wake = asyncio.Event()
        self.broken = False
        self._task = asyncio.create_task(self._run())

    def send(self, **command: Any) -> None:
        """Queue one command, e.g. send(start=...)."""
        self.send_soon(**command)
        self._wake.set()

    def send_soon(self, **command: Any) -> None:
        """Queue a command that may wait a moment, so that it shares a message with a later one."""
        if self.broken:
            return
        self._pending.append(self._plane.command(**command))
        if len(self._pending) == 1:
            asyncio.get_running_loop().call_later(SOON_S, self._wake.set)
        if len(self._pending) > MAX_PENDING:
            log.warning("address=%s event=link_overflow", self.address)
            self.close()

    def cancel(self, sequence_id: str, attempt: int) -> None:
        """Tell the worker to stop the sequence, in case it still has it."""
        self.send(cancel=common_pb2.CancelSequence(sequence_id=sequence_id, attempt=attempt))

    def close(self) -> None:
        """End the stream; the worker cancels all that it still runs for this router."""
        self._task.cancel()
        self._break()

    async def _run(self) -> None:
        try:
            async with open_channel(self.address) as channel:
                call = self._plane.stub(channel).Run(metadata=((ROUTER_ID, self._router_id),))
                writer = asyncio.create_task(self._write(call))
                try:
                    while (response := await call.read()) is not grpc.aio.EOF:
                        self._deliver(response)
                finally:
                    writer.cancel()
                    call.cancel()
                    await asyncio.gather(writer, return_exceptions=True)
        except grpc.aio.AioRpcError as error:
            log.info("address=%s event=run_ended code=%s", self.address, error.code().name)
        finally:
            self._break()

    async def _write(self, call: Any) -> None:
        # A broken call is noticed, and reported, by the reader.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._wake.wait()
                self._wake.clear()
                if not self._pending:
                    continue
                commands, self._pending = self._pending, []
                await call.write(self._plane.request(commands=commands))

    def _deliver(self, response: Any) -> None:
        for event in response.events:
            choice = self.routes.get(event.sequence_id)
            if choice is not None:
                self._on_event(choice, event)

    def _break(self) -> None:
        if not self.broken:
            self.broken = True
            self._pending.clear()
            self._on_broken()
