"""A RouterService in this process that answers as scripted, for tests of what talks to a router."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from headway.v1 import common_pb2, router_pb2, router_pb2_grpc

WORDS = ["Hello", ", ", "", "wörld", "!"]


@dataclass
class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """`fail` makes every Generate end with that code after the first word; `endless` never finishes."""

    fail: grpc.StatusCode | None = None
    endless: bool = False
    requests: list[Any] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        self.requests.append(request)
        context.add_callback(self.ended.set)
        choices = range(request.n or 1)
        for choice in choices:
            yield _started(choice)
        for index, word in enumerate(WORDS):
            for choice in choices:
                yield _delta(choice, index, word)
            if self.fail is not None:
                context.abort_with_status(_status(self.fail))
        while self.endless and context.is_active():
            yield _delta(0, 9, ".")
        for choice in choices:
            yield _finished(choice)

    def Explain(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        picked = router_pb2.PlacementOption(
            prefill_worker="p0", decode_worker="d0", overlap_tokens=16, wait_s=0.001, compute_s=0.002, cost_s=0.003
        )
        refused = router_pb2.PlacementOption(decode_worker="d1", refused="draining")
        return router_pb2.ExplainResponse(prompt_tokens=20, options=[picked, refused])

    def Fleet(self, request: Any, context: Any) -> Any:
        status = router_pb2.WorkerStatus(ready=True, running_sequences=2, kv_tokens=100, free_slots=30, total_slots=40)
        worker = router_pb2.WorkerView(
            worker_id="d0", node_id="n0", role=common_pb2.WORKER_ROLE_DECODE, address="h:1", status=status, pid=7
        )
        store = router_pb2.StoreView(node_id="n0", address="h:2", indexed_blocks=5, watching=True)
        card = common_pb2.ModelCard(name="tiny", context_tokens=512, kv_format=common_pb2.KvFormat(block_size=16))
        return router_pb2.FleetResponse(workers=[worker], stores=[store], model=card, requests_in_flight=2)


@contextmanager
def serve(router: FakeRouter) -> Iterator[str]:
    """Listens on loopback; gives the address."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def _started(choice: int) -> Any:
    started = router_pb2.Started(request_id="r1", prompt_tokens=20, model="tiny")
    return router_pb2.GenerateResponse(choice=choice, started=started)


def _delta(choice: int, index: int, word: str) -> Any:
    top = [common_pb2.TokenLogprob(token_id=index, logprob=-0.5)]
    token = common_pb2.Token(token_id=100 + index, output_index=index, logprob=-0.5, top_logprobs=top)
    return router_pb2.GenerateResponse(choice=choice, delta=router_pb2.Delta(text=word, tokens=[token]))


def _finished(choice: int) -> Any:
    finished = router_pb2.Finished(
        reason=common_pb2.FINISH_REASON_STOP,
        usage=router_pb2.Usage(prompt_tokens=20, cached_tokens=16, computed_tokens=4, output_tokens=5),
        timings=common_pb2.Timings(ttft_s=0.01, total_s=0.05),
        prefill_worker="p0",
        decode_worker="d0",
        stop_token_id=2,
    )
    return router_pb2.GenerateResponse(choice=choice, finished=finished)


def _status(code: grpc.StatusCode) -> Any:
    status = status_pb2.Status(code=code.value[0], message="the queue is full; try again later")
    delay = duration_pb2.Duration(seconds=1, nanos=500_000_000)
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status)
