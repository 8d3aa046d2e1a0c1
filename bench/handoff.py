"""Same-node handoff: from "prefill done" to "decode may step", for prompts of 64 to 8,128 tokens.

python -m bench.handoff [--quick]    (--quick: simulated engines, under a minute; else the default model)

Every prompt is sent once to fill the prefix cache, so that the repeats measure the handoff and not the prefill. Both
instants are read from the host's monotonic clock by the workers themselves; the router's hop lies between them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.report import finish, mark, median, percentile, plot_lines, progress
from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.v1 import router_pb2, router_pb2_grpc

LENGTHS = [64, 256, 1024, 2048, 4096, 8128]
OUTPUTS = 12
HANDOFF_MARK_MS = 2.0
FLAT_MARK = 1.5


@dataclass(frozen=True)
class Sample:
    """One request: seconds of handoff, the gap of the second token over a median step, and bytes."""

    handoff_s: float
    gap_s: float
    handoff_bytes: int
    working_copy_bytes: int
    ttft_s: float


async def one(stub: router_pb2_grpc.RouterServiceAsyncStub, prompt: list[int]) -> Sample:
    request = router_pb2.GenerateRequest(
        tokens=router_pb2.TokenPrompt(token_ids=prompt),
        max_tokens=OUTPUTS,
        ignore_eos=True,
        placement=router_pb2.PlacementHint(force_apart=True),
    )
    started, arrivals = time.monotonic(), []
    async for response in stub.Generate(request):
        if response.HasField("delta"):
            arrivals += [time.monotonic()] * len(response.delta.tokens)
        if response.HasField("finished"):
            finished = response.finished
    assert len(arrivals) == OUTPUTS
    assert finished.prefill_worker.startswith("prefill")
    assert finished.decode_worker.startswith("decode")
    steps = [after - before for before, after in itertools.pairwise(arrivals[1:])]
    return Sample(
        handoff_s=finished.timings.joined_at_s - finished.timings.prefilled_at_s,
        gap_s=arrivals[1] - arrivals[0] - median(steps),
        handoff_bytes=finished.usage.handoff_bytes,
        working_copy_bytes=finished.usage.working_copy_bytes,
        ttft_s=arrivals[0] - started,
    )


async def measure(address: str, repeats: int) -> list[dict[str, Any]]:
    text = list(random.Random(1).randbytes(max(LENGTHS)))
    rows = []
    async with open_channel(address) as channel:
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        for length in LENGTHS:
            cold = await one(stub, text[:length])
            progress(f"{length} tokens: first prefill took {cold.ttft_s:.2f} s")
        samples: dict[int, list[Sample]] = {length: [] for length in LENGTHS}
        for repeat in range(repeats):
            progress(f"repeat {repeat + 1} of {repeats}")
            for length in LENGTHS:
                samples[length].append(await one(stub, text[:length]))
                await asyncio.sleep(0.02)
    for length, row in samples.items():
        rows.append(
            {
                "tokens": length,
                "handoff_p50_ms": median([s.handoff_s for s in row]) * 1e3,
                "handoff_p99_ms": percentile([s.handoff_s for s in row], 0.99) * 1e3,
                "second_token_gap_ms": median([s.gap_s for s in row]) * 1e3,
                "handoff_bytes": max(s.handoff_bytes for s in row),
                "working_copy_bytes": max(s.working_copy_bytes for s in row),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="simulated engines, under a minute")
    arguments = parser.parse_args()
    if arguments.quick:
        spec, repeats = FleetSpec(prefill=1, decode=1, engine="sim", model="sim"), 100
    else:
        spec, repeats = FleetSpec(prefill=1, decode=1), 30
    with tempfile.TemporaryDirectory() as folder, Fleet(spec, Path(folder)) as fleet:
        fleet.wait_ready(120)
        rows = uvloop.run(measure(fleet.address, repeats))
    by_length = {row["tokens"]: row for row in rows}
    flat = by_length[8128]["handoff_p50_ms"] / by_length[256]["handoff_p50_ms"]
    marks = {
        "handoff_p50_ms": mark(by_length[1024]["handoff_p50_ms"], HANDOFF_MARK_MS, "ms", at_most=True),
        "handoff_flat_ratio": mark(flat, FLAT_MARK, "ratio", at_most=True),
        "handoff_bytes": mark(max(row["handoff_bytes"] for row in rows), 0, "bytes", at_most=True),
    }
    xs = [float(row["tokens"]) for row in rows]
    lines = {key: (xs, [row[key] for row in rows]) for key in ("handoff_p50_ms", "handoff_p99_ms")}
    plot_lines("handoff", "Handoff on one node", "prompt tokens", "ms", lines)
    engine = "simulated" if arguments.quick else "transformers float32"
    finish("handoff", {"engine": engine, "repeats": repeats, "rows": rows, "marks": marks})


if __name__ == "__main__":
    main()
