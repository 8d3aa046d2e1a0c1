"""The blocking client."""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
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

_Result = SimpleQueue[tuple[Any, BaseException | None]]


def _uninterrupted(call: Callable[[], Any]) -> Any:
    """What `call` gives or raises. Ctrl-C, which only the main thread feels, ends the wait for it and not the call.

    Inside gRPC's bookkeeping an interrupt leaves a call that no thread looks after, and closing its channel never ends.
    So the main thread hands its calls to threads, by means that an interrupt cannot leave half done: threading's
    Condition, which Thread and Future are made of, is not safe either. It costs 45 us a call.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    result: _Result = SimpleQueue()
    _thread.start_new_thread(_run, (call, result))
    value, error = result.get()
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback has this frame
    return value


def _run(call: Callable[[], Any], result: _Result) -> None:
    try:
        result.put((call(), None))
    except BaseException as error:  # whatever it is, it is raised where the call was asked for
        result.put((None, error))


class Stream(Iterator[Event]):
    """Started, then deltas, then Finished (per choice). `close`, or leaving the `with`, cancels what still runs;
    so does Ctrl-C while it is waited for.

    Raises HeadwayClientError.
    """

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._events: deque[Event] = deque()

    def __next__(self) -> Event:
        try:
            while not self._events:
                self._events.extend(convert.events_from_proto(_uninterrupted(partial(next, self._call))))
            return self._events.popleft()
        except grpc.RpcError as error:
            raise from_rpc(error, self._address) from None
        except BaseException:  # over, or interrupted: the event that is still waited for would be lost
            self.close()
            raise

    def close(self) -> None:
        _uninterrupted(self._call.cancel)

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
        call = _uninterrupted(partial(self._router.Generate, request, timeout=rpc_timeout_s(request)))
        return Stream(call, self.address)

    def explain(self, prompt: Prompt, **options: Unpack[Options]) -> Explanation:
        """Where the prompt would go and why, without running it."""
        request = router_pb2.ExplainRequest(request=build_request(prompt, options))
        return convert.explanation_from_proto(self._unary(self._router.Explain, request))

    def fleet(self) -> FleetView:
        """Workers, stores, load and cache."""
        return convert.fleet_from_proto(self._unary(self._router.Fleet, router_pb2.FleetRequest()))

    def close(self) -> None:
        """Cancels all that still runs."""
        _uninterrupted(self._channel.close)

    def _unary(self, method: Any, request: Any) -> Any:
        try:
            return _uninterrupted(partial(method, request, timeout=UNARY_TIMEOUT_S))
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
