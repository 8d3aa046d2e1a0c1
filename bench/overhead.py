"""What Headway itself costs: simulated engines with zero compute, prefill and decode apart, client on the same cores.

python -m bench.overhead [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvloop

from bench.report import busy_share, cpu_seconds, finish, mark, median, percentile, plot_lines, progress
from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.v1 import kvstore_pb2, kvstore_pb2_grpc, router_pb2, router_pb2_grpc

TTFT_MARK_MS = 3.0
REQUESTS_MARK = 400.0


@dataclass
class Run:
    """What one series of requests measured: seconds of TTFT, and wall seconds in all."""

    ttft_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0


def prompts(count: int, tokens: int, seed: int) -> list[router_pb2.GenerateRequest]:
    """Distinct random prompts of byte ids; nothing of them can be cached."""
    draw = random.Random(seed)
    return [
        router_pb2.GenerateRequest(
            tokens=router_pb2.TokenPrompt(token_ids=list(draw.randbytes(tokens))),
            placement=router_pb2.PlacementHint(force_apart=True),
        )
        for _ in range(count)
    ]


async def one(stub: router_pb2_grpc.RouterServiceAsyncStub, request: router_pb2.GenerateRequest, run: Run) -> None:
    """Run a request; check that its two phases really ran apart and that nothing was cached or lost."""
    started, first, tokens = time.monotonic(), 0.0, 0
    async for response in stub.Generate(request):
        if response.HasField("delta") and response.delta.tokens:
            first = first or time.monotonic()
            tokens += len(response.delta.tokens)
        if response.HasField("finished"):
            finished = response.finished
    assert finished.prefill_worker.startswith("prefill"), finished
    assert finished.decode_worker.startswith("decode"), finished
    assert finished.usage.cached_tokens == 0
    assert tokens == request.max_tokens
    run.ttft_s.append(first - started)


async def series(
    stub: router_pb2_grpc.RouterServiceAsyncStub, requests: list[router_pb2.GenerateRequest], in_flight: int
) -> Run:
    """All requests, `in_flight` at a time."""
    run, waiting = Run(), list(reversed(requests))

    async def lane() -> None:
        while waiting:
            await one(stub, waiting.pop(), run)

    started = time.monotonic()
    await asyncio.gather(*(lane() for _ in range(in_flight)))
    run.wall_s = time.monotonic() - started
    return run


async def leases_left(address: str) -> int:
    async with open_channel(address) as channel:
        stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        for _ in range(50):
            stats = await stub.Stats(kvstore_pb2.StatsRequest(check_integrity=True))
            assert not stats.integrity_errors, stats.integrity_errors
            if not stats.leases:
                return 0
            await asyncio.sleep(0.1)
        return int(stats.leases)


async def measure(fleet: Fleet, *, quick: bool) -> dict[str, Any]:
    rounds, single, parallel = (3, 30, 300) if quick else (5, 100, 1500)
    pids = {name: fleet.process(name) for name in fleet.names}
    out: dict[str, Any] = {"rows": []}
    async with open_channel(fleet.address) as channel:
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        await series(stub, with_output(prompts(64, 1024, 0), 2), 8)
        for tokens, outputs in ((1024, 2), (1024, 16), (8192, 2), (8192, 16)):
            ttft: list[float] = []
            rates: list[float] = []
            parallel_here = parallel * 1024 // tokens if outputs == 2 else parallel * 1024 // tokens // 3
            busy = 0.0
            cpu_before = {name: cpu_seconds(pid) for name, pid in pids.items()}
            own_before, done = time.process_time(), 0
            for round_ in range(rounds):
                progress(f"{tokens} in, {outputs} out: round {round_ + 1} of {rounds}")
                seed = tokens * 1000 + outputs * 100 + round_ + 1
                alone = await series(stub, with_output(prompts(single, tokens, 2 * seed), outputs), 1)
                requests = with_output(prompts(max(32, parallel_here), tokens, 2 * seed + 1), outputs)
                with busy_share() as share:
                    together = await series(stub, requests, 32)
                ttft.append(median(alone.ttft_s))
                rates.append(len(requests) / together.wall_s)
                busy = max(busy, share["busy"])
                done += len(requests) + single
            cpu = {name: (cpu_seconds(pid) - cpu_before[name]) / done * 1e6 for name, pid in pids.items()}
            cpu["client"] = (time.process_time() - own_before) / done * 1e6
            out["rows"].append(
                {
                    "prompt_tokens": tokens,
                    "output_tokens": outputs,
                    "ttft_p50_ms": median(ttft) * 1e3,
                    "requests_per_s": median(rates),
                    "parallel_ttft_p99_ms": percentile(together.ttft_s, 0.99) * 1e3,
                    "cpu_us_per_request": {name: round(value) for name, value in cpu.items()},
                    "cpu_busy_share": round(busy, 3),
                    "cpu_bound": busy > 0.9,
                }
            )
    return out


def with_output(requests: list[router_pb2.GenerateRequest], tokens: int) -> list[router_pb2.GenerateRequest]:
    for request in requests:
        request.max_tokens = tokens
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    arguments = parser.parse_args()
    spec = FleetSpec(prefill=2, decode=2, engine="sim", model="sim", slab_bytes=512 << 20)
    with tempfile.TemporaryDirectory() as folder, Fleet(spec, Path(folder)) as fleet:
        fleet.wait_ready(60)
        try:
            out = uvloop.run(measure(fleet, quick=arguments.quick))
        except grpc.aio.AioRpcError as error:
            raise SystemExit(f"a request failed: {error.details()}") from None
        out["leases_left"] = uvloop.run(leases_left(fleet.address_of("kvstore")))
    rows = {(row["prompt_tokens"], row["output_tokens"]): row for row in out["rows"]}
    short = rows[1024, 2]
    out["marks"] = {
        "ttft_overhead_p50_ms": mark(short["ttft_p50_ms"], TTFT_MARK_MS, "ms", at_most=True),
        "requests_per_s": mark(short["requests_per_s"], REQUESTS_MARK, "1/s", at_most=False),
    }
    lengths = [1024.0, 8192.0]
    lines = {
        f"{outputs} tokens out": (lengths, [rows[int(n), outputs]["ttft_p50_ms"] for n in lengths])
        for outputs in (2, 16)
    }
    plot_lines("overhead", "TTFT of a fleet with zero compute", "prompt tokens", "TTFT p50 (ms)", lines)
    finish("overhead", out)


if __name__ == "__main__":
    main()
