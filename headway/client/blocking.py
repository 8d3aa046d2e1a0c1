"""The blocking client."""

from __future__ import annotations

import threading
import weakref
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

_Call = Callable[[], Any]
_Result = SimpleQueue[tuple[Any, BaseException | None]]
_Jobs = SimpleQueue[tuple[_Call, _Result] | None]


class _Calls:
    """Keeps Ctrl-C out of gRPC: what the main thread asks for runs in a thread of its own, and the main thread waits.

    An interrupt inside gRPC's bookkeeping leaves a call that no thread looks after; closing its channel never ends.
    The hand-over uses only SimpleQueue, which unlike Condition and Future an interrupt cannot leave half changed.
    The thread ends when this object is collected, so that no call can be handed over too late to be answered.
    """

    def __init__(self) -> None:
        self._jobs: _Jobs = SimpleQueue()
        weakref.finalize(self, self._jobs.put, None)
        threading.Thread(target=_run_all, args=(self._jobs,), name="headway-client", daemon=True).start()

    def run(self, call: _Call) -> Any:
        """What `call` gives or raises. Threads other than the main one are not interrupted and call it themselves."""
        if threading.current_thread() is not threading.main_thread():
            return call()
        result: _Result = SimpleQueue()
        self._jobs.put((call, result))
        value, error = result.get()
        if error is not None:
            raise error
        return value


def _run_all(jobs: _Jobs) -> None:
    while _run_next(jobs):
        pass


def _run_next(jobs: _Jobs) -> bool:
    """A function of its own, so that nothing of a call is kept alive while the next one is waited for."""
    job = jobs.get()
    if job is None:
        return False
    call, result = job
    try:
        result.put((call(), None))
    except BaseException as error:  # whatever it is, it is raised where the call was asked for
        result.put((None, error))
    return True


class Stream(Iterator[Event]):
    """Started, then deltas, then Finished (per choice). `close`, or leaving the `with`, cancels what still runs;
    so does Ctrl-C while it is waited for.

    Raises HeadwayClientError.
    """

    def __init__(self, call: Any, calls: _Calls, address: str) -> None:
        self._call = call
        self._calls = calls
        self._address = address
        self._events: deque[Event] = deque()

    def __next__(self) -> Event:
        try:
            while not self._events:
                self._events.extend(convert.events_from_proto(self._calls.run(partial(next, self._call))))
            return self._events.popleft()
        except grpc.RpcError as error:
            raise from_rpc(error, self._address) from None
        except BaseException:  # over, or interrupted: then the event that the thread still waits for would be lost
            self.close()
            raise

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
        self._calls = _Calls()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer at once."""
        with self.stream(prompt, **options) as stream:
            return Answer.of(stream)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """The answer as it comes. The request is sent at once, before the first event is asked for."""
        request = build_request(prompt, options)
        call = self._calls.run(partial(self._router.Generate, request, timeout=rpc_timeout_s(request)))
        return Stream(call, self._calls, self.address)

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
            return self._calls.run(partial(method, request, timeout=UNARY_TIMEOUT_S))
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
