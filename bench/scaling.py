"""Each phase scales on its own: workers are added and drained while a fixed load runs; simulated engines.

python -m bench.scaling [--quick]

First 1 prefill and 2 decode workers, to which 2 prefill workers are added; then 2 prefill and 1 decode worker, to which
2 decode workers are added. After a while the added ones are drained again. The same arrivals come in every stretch of
time (of other prompts), so that the stretches before and after see the same load. --quick: shorter stretches.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.report import busy_share, finish, mark, plot_lines, progress
from headway.client import Client
from headway.core.predict import Predictor
from headway.core.step import StepLimits
from headway.fleet import Fleet
from headway.replay.drive import Replay, Seen
from headway.replay.live import During, Live
from headway.sim.hardware import Linear
from headway.sim.policies import entries
from headway.sim.scenario import Scenario
from headway.sim.summary import percentile
from headway.sim.trace import Trace
from headway.sim.workload import Workload, make_trace

STRETCH_S = 30.0
QUICK_STRETCH_S = 8.0
# A prompt of 1,880 tokens takes 0.19 s: at 4.6 a second one prefill worker is loaded to nine tenths.
PREFILL = (0.005, 1e-4, 0.0)
# Alone, a decode worker has 39 sequences and steps of 101 ms; of three, each has four, and steps of 31 ms.
STEP = (0.023, 0.002, 0.0)
RATE = 4.6
PROMPT_TOKENS, OUTPUT_TOKENS = 1800, 80


@dataclass
class Case:
    """A fleet, the role that is added to it, and what is measured of it."""

    name: str
    prefill: int
    decode: int
    role: str
    rate: float
    added: int = 2
    # When each added worker was ready, by name; infinite while it is not.
    ready_s: dict[str, float] = field(default_factory=dict)


def scenario(case: Case) -> Scenario:
    hardware = Linear("scaling", "made up", Predictor(PREFILL, STEP), 8, 400_000, 256)
    limits = StepLimits(batch=256, chunk_tokens=1 << 20, chunk_s=0.25, shared_chunk_s=0.05)
    return Scenario(hardware, case.prefill, case.decode, nodes=1, limits=limits, link_bytes_per_s=1e9)


def trace_of(case: Case, stretch_s: float) -> Trace:
    """Four and a half stretches: to warm up, before, to settle, after, and half of one while workers drain."""
    workload = Workload(
        case.name, case.rate, stretch_s, system_prompts=1, system_tokens=0, turns=1.0, turn_tokens=PROMPT_TOKENS,
        output_tokens=OUTPUT_TOKENS, pause_s=1e-6, spread=0.3,
    )  # fmt: skip
    one = make_trace(workload, seed=3)
    requests = [
        replace(request, arrival_s=request.arrival_s + number * stretch_s, keys=())
        for number in range(5)
        for request in one.requests
    ]
    return replace(one, requests=[request for request in requests if request.arrival_s < 4.5 * stretch_s])


def measure(case: Case, stretch_s: float) -> dict[str, Any]:
    trace = trace_of(case, stretch_s)
    progress(f"{case.name}: {len(trace)} requests in {4.5 * stretch_s:.0f} s")

    def during(fleet: Fleet, run: Replay) -> None:
        time.sleep(max(0.0, 2 * stretch_s - run.now_s))
        names = [fleet.add_worker(case.role) for _ in range(case.added)]
        case.ready_s = dict.fromkeys(names, math.inf)
        wait_ready(fleet, case, run)
        time.sleep(max(0.0, 4 * stretch_s - run.now_s))
        for name in names:
            fleet.drain(name)
        for name in names:
            fleet.wait_gone(name, 60.0)

    spec = Live(scenario(case), entries()["headway"]).spec
    with tempfile.TemporaryDirectory() as folder, Fleet(spec, Path(folder)) as fleet:
        fleet.wait_ready()
        seen = asyncio.run(drive(Replay(trace, fleet.addresses), fleet, during))
    return figures(case, seen, stretch_s)


async def drive(run: Replay, fleet: Fleet, during: During) -> list[Seen]:
    beside = asyncio.create_task(asyncio.to_thread(during, fleet, run))
    seen = await run.run()
    await beside
    return seen


def wait_ready(fleet: Fleet, case: Case, run: Replay) -> None:
    """When the router first said of each of them that it was ready."""
    with Client(fleet.address) as client:
        until = time.monotonic() + 30.0
        while math.inf in case.ready_s.values() and time.monotonic() < until:
            for worker in client.fleet().workers:
                if worker.ready and case.ready_s.get(worker.worker_id) == math.inf:
                    case.ready_s[worker.worker_id] = run.now_s
            time.sleep(0.02)


def traffic_after_s(case: Case, seen: Sequence[Seen]) -> list[float]:
    """For each added worker: from ready until the arrival of the first request that it served; 0 where one that came
    before went there, infinite where it never was ready, or served none.
    """
    first = dict.fromkeys(case.ready_s, math.inf)
    for one in seen:
        for name in {one.prefill_worker, one.decode_worker} & first.keys():
            first[name] = min(first[name], one.request.arrival_s)
    return [max(0.0, first[name] - at) if at < math.inf else math.inf for name, at in case.ready_s.items()]


def figures(case: Case, seen: Sequence[Seen], stretch_s: float) -> dict[str, Any]:
    before = stretch(seen, stretch_s, 2 * stretch_s)
    after = stretch(seen, 3 * stretch_s, 4 * stretch_s)
    failed = [one.details for one in seen if not one.ok]
    return {
        "requests": len(seen),
        "before": before,
        "after": after,
        "ttft_p90_ratio": after["ttft_p90_s"] / before["ttft_p90_s"],
        "ttft_p50_ratio": after["ttft_p50_s"] / before["ttft_p50_s"],
        "itl_p99_ratio": after["itl_p99_s"] / before["itl_p99_s"],
        "itl_p50_ratio": after["itl_p50_s"] / before["itl_p50_s"],
        "ready after": [round(at - 2 * stretch_s, 2) for at in case.ready_s.values()],
        "traffic after ready": [round(after_s, 2) for after_s in traffic_after_s(case, seen)],
        "failed": failed,
    }


def stretch(seen: Sequence[Seen], start_s: float, end_s: float) -> dict[str, float]:
    """Of what happened in that time."""
    times = sorted(one.ttft_s for one in seen if one.ttft_s and start_s <= one.request.arrival_s < end_s)
    gaps = sorted(
        gap for one in seen for gap, at in zip(one.gaps_s, one.token_times_s[1:], strict=True) if start_s <= at < end_s
    )
    return {
        "ttft_p50_s": percentile(times, 0.5),
        "ttft_p90_s": percentile(times, 0.9),
        "itl_p50_s": percentile(gaps, 0.5),
        "itl_p99_s": percentile(gaps, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    stretch_s = QUICK_STRETCH_S if arguments.quick else STRETCH_S
    result: dict[str, Any] = {"quick": arguments.quick}
    with busy_share() as busy:
        more_prefill = measure(Case("1P+2D to 3P+2D", 1, 2, "prefill", RATE), stretch_s)
        progress(f"  {more_prefill}")
        more_decode = measure(Case("2P+1D to 2P+3D", 2, 1, "decode", RATE), stretch_s)
        progress(f"  {more_decode}")
    result |= {"1P+2D to 3P+2D": more_prefill, "2P+1D to 2P+3D": more_decode, "cores_busy": round(busy["busy"], 3)}
    failures = len(more_prefill["failed"]) + len(more_decode["failed"])
    slowest = max(*more_prefill["traffic after ready"], *more_decode["traffic after ready"])
    result["marks"] = {
        "scale_prefill_ttft_p90_ratio": mark(more_prefill["ttft_p90_ratio"], 0.5, "ratio", at_most=True),
        "scale_prefill_itl_p99_off": mark(abs(more_prefill["itl_p99_ratio"] - 1), 0.1, "of 1", at_most=True),
        "scale_decode_itl_p99_ratio": mark(more_decode["itl_p99_ratio"], 0.5, "ratio", at_most=True),
        "scale_decode_ttft_p90_off": mark(abs(more_decode["ttft_p90_ratio"] - 1), 0.1, "of 1", at_most=True),
        "scale_failures": mark(failures, 0, "requests", at_most=True),
        "scale_traffic_after_ready_s": mark(slowest, 2.0, "s", at_most=True),
    }
    plot(more_prefill, more_decode)
    finish("scaling", result)


def plot(prefill: dict[str, Any], decode: dict[str, Any]) -> None:
    steps = [0.0, 1.0]
    lines = {
        "TTFT p90, prefill added (s)": (steps, [prefill["before"]["ttft_p90_s"], prefill["after"]["ttft_p90_s"]]),
        "TTFT p90, decode added (s)": (steps, [decode["before"]["ttft_p90_s"], decode["after"]["ttft_p90_s"]]),
        "10 × ITL p99, prefill added (s)": (
            steps,
            [10 * prefill["before"]["itl_p99_s"], 10 * prefill["after"]["itl_p99_s"]],
        ),
        "10 × ITL p99, decode added (s)": (
            steps,
            [10 * decode["before"]["itl_p99_s"], 10 * decode["after"]["itl_p99_s"]],
        ),
    }
    plot_lines("scaling", "before (0) and after (1) workers were added", "", "seconds", lines)


if __name__ == "__main__":
    main()
