"""Both sides of Mooncake's transfer engine over TCP: peer-to-peer handshake, a registered slab each, batched writes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mooncake.engine import TransferEngine  # type: ignore[import-not-found]  # lives in the peers' own environment

from bench.transfer.sides.common import Answer, Handler, Slab, serve


def start(config: dict[str, Any]) -> Handler:
    slab = Slab(config["fd"], config["slab_bytes"])
    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("the transfer engine did not start")
    if engine.register_memory(slab.address, slab.bytes):
        raise RuntimeError("the slab was not registered")
    if config["role"] == "target":
        return lambda question: {"at": slab.address, "peer": f"127.0.0.1:{engine.get_rpc_port()}"}
    stride, size, base = config["stride"], config["block_bytes"], config["at"]
    sources = [slab.address + slot * stride for slot in config["source_slots"]]
    targets = [base + slot * stride for slot in config["target_slots"]]
    pool = ThreadPoolExecutor(4)

    def write(first: int, end: int) -> None:
        """One batch. The engine's call returns when the target has acknowledged every block."""
        lengths = [size] * (end - first)
        if engine.batch_transfer_sync_write(config["peer"], sources[first:end], targets[first:end], lengths):
            raise RuntimeError("the transfer failed")

    def move(question: dict[str, Any]) -> Answer:
        blocks, threads = question["blocks"], min(question["threads"], question["blocks"])
        cuts = [blocks * index // threads for index in range(threads + 1)]
        started = time.perf_counter()
        if threads == 1:
            write(0, blocks)
        else:
            list(pool.map(write, cuts[:-1], cuts[1:]))
        return {"seconds": time.perf_counter() - started}

    return move


if __name__ == "__main__":
    serve(start)
