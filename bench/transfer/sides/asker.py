"""A worker that asks its kvstore for a small lease, again and again, and says how long the answers took."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import uvloop

from bench.report import percentile
from bench.transfer.sides.common import Answer, Handler, serve
from bench.transfer.store_pair import Worker

TOKENS = 64
PAUSE_S = 0.002


def start(config: dict[str, Any]) -> Handler:
    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def attach() -> Worker:
        worker = Worker(config["address"], config["role"])
        await worker.ready()
        return worker

    worker = asyncio.run_coroutine_threadsafe(attach(), loop).result()

    def ask(question: dict[str, Any]) -> Answer:
        times = asyncio.run_coroutine_threadsafe(_ask(worker, question["seconds"]), loop).result()
        return {f"p{share:.0%}".rstrip("%") + "_ms": round(percentile(times, share) * 1e3, 3) for share in (0.5, 0.99)}

    return ask


async def _ask(worker: Worker, seconds: float) -> list[float]:
    times, until_s = [], time.monotonic() + seconds
    while time.monotonic() < until_s:
        started = time.perf_counter()
        granted = await worker.acquire([], TOKENS)
        times.append(time.perf_counter() - started)
        await worker.release(granted.lease_id)
        await asyncio.sleep(PAUSE_S)
    return times


if __name__ == "__main__":
    serve(start)
