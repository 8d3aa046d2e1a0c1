"""Both sides of Redis: the source MSETs batches of slots, the target MGETs each batch as soon as it is there.

Keys carry the slot. Lists tell the target which batch to take, and the source that all are in place.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import redis

from bench.transfer.sides.common import Answer, Handler, Slab, serve

WAIT_S = 30


def start(config: dict[str, Any]) -> Handler:
    slab = Slab(config["fd"], config["slab_bytes"])
    server = redis.Redis(port=config["port"])
    server.ping()
    return source(config, slab, server) if config["role"] == "source" else target(config, slab, server)


def source(config: dict[str, Any], slab: Slab, server: Any) -> Handler:
    stride, size, slots = config["stride"], config["block_bytes"], config["source_slots"]

    def move(question: dict[str, Any]) -> Answer:
        blocks, batch = question["blocks"], question["batch"]
        started = time.perf_counter()
        for first in range(0, blocks, batch):
            end = min(first + batch, blocks)
            values = {f"b{i}": slab.view[slots[i] * stride : slots[i] * stride + size] for i in range(first, end)}
            pipe = server.pipeline(transaction=False)
            pipe.mset(values).rpush("batches", f"{first} {end} {int(end == blocks)}").execute()
        if server.blpop("taken", WAIT_S) is None:
            raise TimeoutError("the target did not take all batches")
        return {"seconds": time.perf_counter() - started}

    return move


def target(config: dict[str, Any], slab: Slab, server: Any) -> Handler:
    """Takes batches on a thread of its own, for as long as the process lives."""
    stride, size, slots = config["stride"], config["block_bytes"], config["target_slots"]

    def take() -> None:
        while True:
            item = server.blpop("batches", 0)
            first, end, last = map(int, item[1].split())
            for index, value in enumerate(server.mget([f"b{i}" for i in range(first, end)]), first):
                at = slots[index] * stride
                slab.view[at : at + size] = value
            if last:
                server.rpush("taken", 1)

    threading.Thread(target=take, daemon=True).start()
    return lambda question: {}


if __name__ == "__main__":
    serve(start)
