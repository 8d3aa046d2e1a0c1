"""A trace against real services with simulated engines, beside the simulator.

python -m bench.live --traces FOLDER [--quick] [--only policies,heavy,routers,spike,overload,slow-spike]

4 prefill and 4 decode workers on 4 nodes; every eighth session of the conversation trace, whole, 20 times as fast, the
requests of a tick of its clock evenly over it.
`policies`: ours, the reference's and round-robin, one after the other. `heavy`: ours on slower workers, where queues
are long. `routers`: three routers at once. `spike`: ten times the load for five seconds, three times: marks are the
median of the ITL's ratio and the worst of all else. `overload`: three times the load for a minute. `slow-spike`, where
it is named: a spike in slow motion, to tell the policy from a machine that is busy. --quick: the first 20 seconds,
policies only.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

from bench.live.setting import HEAVY, LEAST_TTFT_S, USUAL, Run, add_arguments, find_trace, run, scenario
from bench.live.spike import overload, spike
from bench.report import busy_share, finish, mark, plot_lines, progress
from headway.sim.trace import Trace

PARTS = ("policies", "heavy", "routers", "spike", "overload")
POLICIES = ("headway", "reference", "round-robin")
ERROR_MARK = 0.15
SPIKES = 3
SLOW_MOTION = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.live", description=__doc__.splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    # Nearly all is freed by counting; a collector that looks often holds up those who answer, too.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    trace = find_trace(arguments.traces, quick=arguments.quick)
    parts = arguments.only.split(",") if arguments.only else PARTS[:1] if arguments.quick else PARTS
    result: dict[str, Any] = {"quick": arguments.quick, "requests": len(trace)}
    marks: dict[str, Any] = {}
    runs: list[Run] = []
    with busy_share() as busy:
        if "policies" in parts:
            runs += [run(policy, trace, scenario(USUAL), policy=policy) for policy in POLICIES]
        if "heavy" in parts:
            runs.append(run("headway, heavy", trace, scenario(HEAVY)))
        if "routers" in parts:
            three = run("headway, three routers", trace, scenario(USUAL), routers=3)
            one = runs[0] if "policies" in parts else run("headway", trace, scenario(USUAL))
            marks["three_routers_vs_one"] = mark(three.mean_s / one.mean_s, 1.15, "ratio", at_most=True)
            runs.append(three)
        if "spike" in parts:
            result["spike"], of_spikes = spikes(trace)
            marks |= of_spikes
        if "slow-spike" in parts:
            result["slow spike"] = spike(trace, USUAL, slower=SLOW_MOTION)
            progress(f"  {result['slow spike']}")
        if "overload" in parts:
            result["overload"] = found = overload(trace, USUAL)
            marks["overload_goodput_ratio"] = mark(found["goodput_ratio"], 0.9, "ratio", at_most=False)
    result["runs"] = {made.name: made.row() for made in runs}
    # Where queues decide: nine in ten of all first tokens may wait three times as long as they take by themselves.
    queued = [made for made in runs[:4] if made.p90_over_unloaded() >= 3 and made.load >= 0.7]
    if {"policies", "heavy"} & set(parts):
        # Without such a run nothing is shown, and nothing holds.
        worst = max((abs(error) for made in queued for error in made.errors()), default=99.0)
        marks["sim_live_error"] = mark(worst, ERROR_MARK, f"of p50 and p90 above {LEAST_TTFT_S} s", at_most=True)
        result["sim_live_error is of"] = [made.name for made in queued]
    if runs:
        plot(runs)
    finish("live", {**result, "cores_busy": round(busy["busy"], 3), "marks": marks})


def spikes(trace: Trace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What was seen of each, and the marks. The ITL's p99 is of the gaps of five seconds, and not the same twice."""
    found = []
    for _ in range(SPIKES):
        found.append(spike(trace, USUAL))
        progress(f"  {found[-1]}")
    ratio = statistics.median(one["itl_p99_ratio"] for one in found)
    return found, {
        "spike_admitted_in_slo": mark(min(one["admitted_in_slo"] for one in found), 0.99, "share", at_most=False),
        "spike_itl_p99_ratio": mark(ratio, 1.2, "ratio", at_most=True),
        "spike_drained_vs_backlog": mark(max(one["drained_vs_backlog"] for one in found), 2.0, "ratio", at_most=True),
        "spike_hung": mark(sum(one["hung"] for one in found), 0, "requests", at_most=True),
    }


def plot(runs: list[Run]) -> None:
    lines = {}
    for made in runs:
        for kind, times in (
            ("live", sorted(one.ttft_s or 0.0 for one in made.seen)),
            ("simulated", sorted(s.ttft_s or 0.0 for s in made.outcome.sequences)),
        ):
            picked = [times[int(at / 50 * (len(times) - 1))] for at in range(51)]
            lines[f"{made.name}, {kind}"] = (picked, [at / 50 for at in range(51)])
    plot_lines("live", "time to first token, live and simulated", "seconds", "share of requests", lines)


if __name__ == "__main__":
    main()
