"""The asyncio client: as the blocking one, with `await` and `async for`."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Unpack

import grpc

from headway.client import convert
from headway.client.blocking import UNARY_TIMEOUT_S
from headway.client.errors import from_rpc
from headway.client.request import Options, Prompt, build_request, rpc_timeout_s
from headway.client.results import Answer, Event, Explanation, FleetView
from headway.runtime.channels import open_channel
from headway.v1 import router_pb2, router_pb2_grpc


class AsyncStream(AsyncIterator[Event]):
    """See Stream; `aclose`, or leaving the `async with`, cancels what still runs."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._responses = aiter(call)
        self._address = address
        self._events: deque[Event] = deque()

    async def __anext__(self) -> Event:
        try:
            while not self._events:
                self._events.extend(convert.events_from_proto(await anext(self._responses)))
            return self._events.popleft()
        except grpc.RpcError as error:
            raise from_rpc(error, self._address) from None

    async def aclose(self) -> None:
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncClient:
    """RouterService at "host:port", for one event loop; every method raises HeadwayClientError."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        self.address = address
        self._channel = open_channel(address)
        self._router: Any = router_pb2_grpc.RouterServiceStub(self._channel)

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer at once."""
        async with self.stream(prompt, **options) as stream:
            return Answer.of([event async for event in stream])

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """The answer as it comes. The request is sent at once, before the first event is asked for."""
        request = build_request(prompt, options)
        return AsyncStream(self._router.Generate(request, timeout=rpc_timeout_s(request)), self.address)

    async def explain(self, prompt: Prompt, **options: Unpack[Options]) -> Explanation:
        """Where the prompt would go and why, without running it."""
        request = router_pb2.ExplainRequest(request=build_request(prompt, options))
        return convert.explanation_from_proto(await self._unary(self._router.Explain, request))

    async def fleet(self) -> FleetView:
        """Workers, stores, load and cache."""
        return convert.fleet_from_proto(await self._unary(self._router.Fleet, router_pb2.FleetRequest()))

    async def close(self) -> None:
        """Cancels all that still runs."""
        await self._channel.close()

    async def _unary(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=UNARY_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
