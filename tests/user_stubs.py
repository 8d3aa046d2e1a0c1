"""What a user without headway does: calls every RPC of RouterService through stubs generated from protos/.

Run as `python user_stubs.py HOST:PORT` with the stubs on the path; prints one JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import grpc

from headway.v1 import common_pb2, router_pb2, router_pb2_grpc

assert importlib.util.find_spec("headway.client") is None, "this must run without headway"


def main(address: str) -> dict[str, object]:
    with grpc.insecure_channel(address) as channel:
        router = router_pb2_grpc.RouterServiceStub(channel)
        request = router_pb2.GenerateRequest(
            text=b"hello", max_tokens=4, sampling=common_pb2.Sampling(temperature=1.0, seed=7)
        )
        events = list(router.Generate(request, timeout=30))
        explained = router.Explain(router_pb2.ExplainRequest(request=request), timeout=10)
        fleet = router.Fleet(router_pb2.FleetRequest(), timeout=10)
        hello = router_pb2.WorkerHello(
            worker_id="user", node_id="elsewhere", role=common_pb2.WORKER_ROLE_PREFILL, address="127.0.0.1:1",
            kvstore_address="127.0.0.1:1", model=fleet.model, max_batch=1,
        )  # fmt: skip
        announced = next(router.Announce(iter([router_pb2.AnnounceRequest(hello=hello)]), timeout=10))
    return {
        "grpc": grpc.__version__,
        "events": [[field.name for field, _ in event.ListFields()] for event in events],
        "tokens": [token.token_id for event in events for token in event.delta.tokens],
        "options": len(explained.options),
        "workers": sorted(worker.worker_id for worker in fleet.workers),
        "router": announced.router_id,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
