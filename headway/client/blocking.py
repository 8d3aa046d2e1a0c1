"""The blocking client."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Unpack

import grpc

from headway.client import convert
from headway.client.errors import from_rpc
from headway.client.request import Options, Prompt, build_request, rpc_timeout_s
from headway.client.results import Answer, Event, Explanation, FleetView
from headway.runtime.channels import OPTIONS
from headway.v1 import router_pb2, router_pb2_grpc

UNARY_TIMEOUT_S = 10.0


class Stream(Iterator[Event]):
    """Started, then deltas, then Finished (per choice). `close`, or leaving the `with`, cancels what still runs.

    Raises HeadwayClientError.
    """

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._events: deque[Event] = deque()

    def __next__(self) -> Event:
        try:
            while not self._events:
                self._events.extend(convert.events_from_proto(next(self._call)))
            return self._events.popleft()
        except grpc.RpcError as error:
            raise from_rpc(error, self._address) from None

    def close(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """RouterService at "host:port". Safe to share between threads; every method raises HeadwayClientError."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._router: Any = router_pb2_grpc.RouterServiceStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer at once."""
        with self.stream(prompt, **options) as stream:
            return Answer.of(stream)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """The answer as it comes. The request is sent at once, before the first event is asked for."""
        request = build_request(prompt, options)
        return Stream(self._router.Generate(request, timeout=rpc_timeout_s(request)), self.address)

    def explain(self, prompt: Prompt, **options: Unpack[Options]) -> Explanation:
        """Where the prompt would go and why, without running it."""
        request = router_pb2.ExplainRequest(request=build_request(prompt, options))
        return convert.explanation_from_proto(self._unary(self._router.Explain, request))

    def fleet(self) -> FleetView:
        """Workers, stores, load and cache."""
        return convert.fleet_from_proto(self._unary(self._router.Fleet, router_pb2.FleetRequest()))

    def close(self) -> None:
        """Cancels all that still runs."""
        self._channel.close()

    def _unary(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=UNARY_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
