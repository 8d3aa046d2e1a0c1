"""Routing policies on public traces, in virtual time: first the field's published rows, then ours beside them.

python -m bench.policies --traces FOLDER [--quick] [--seeds 8]

FOLDER holds mooncake_conversation_trace.jsonl[.gz], mooncake_synthetic_trace.jsonl[.gz] and
AzureLLMInferenceTrace2023_code.csv[.gz]. The setting is that of docs/routing.md: 8 prefill and 6 decode workers, whole
prompts, decode workers compute none. A trace is sped up until the reference default uses 70 % and 90 % of its prefill
workers' time; 110 % is 11/9 of the latter speed. --quick: the first quarter of each trace, one seed, no bisection.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.policies_table import HEADS, reproduced
from bench.report import RESULTS, finish, mark, progress
from headway.sim.fleet import SimFleet
from headway.sim.hardware import STUDY
from headway.sim.policies import entries
from headway.sim.report import draw
from headway.sim.scenario import Outcome, Scenario
from headway.sim.summary import Summary, clairvoyant_s, percentile, summarise
from headway.sim.trace import Trace, read_trace

CONVERSATION = "mooncake_conversation_trace.jsonl"
SYNTHETIC = "mooncake_synthetic_trace.jsonl"
AZURE = "AzureLLMInferenceTrace2023_code.csv"
LOADS = (0.7, 0.9, 1.1)
LINKS = {"25 GB/s": 25e9, "3 GB/s": 3e9, "no pulls": 0.0}
REFERENCES = ("reference", "reference-fcfs-0", "reference-wspt-0", "reference-fcfs-1", "reference-wspt-1")
IN_SLO = 0.9
OURS = "headway"

Runs = dict[str, list[Summary]]


@dataclass
class Bench:
    """One call's settings; `seeds` of ties, chance and noise. Virtual time is the same on a busy machine."""

    executor: Executor
    seeds: range
    quick: bool

    def run(self, trace: Trace, scenario: Scenario, names: Sequence[str], seeds: range | None = None) -> Runs:
        seeds = seeds or self.seeds
        calls = [(name, replace(scenario, seed=seed)) for name in names for seed in seeds]
        found = self.executor.map(summary, itertools.repeat(trace), *zip(*calls, strict=True))
        runs: Runs = {}
        for name in names:
            first, *_ = runs[name] = list(itertools.islice(found, len(seeds)))
            progress(f"  {name:18s} mean {first.mean_s:7.2f} p99 {first.p99_s:7.2f} in SLO {first.in_slo:.2f}")
        return runs

    def speeds(self, trace: Trace) -> dict[float, float]:
        """load → how many times as fast the trace must come."""
        found = self.executor.map(speed_of_load, itertools.repeat(trace), LOADS[:2])
        speeds = dict(zip(LOADS, found, strict=False))
        return {**speeds, LOADS[2]: speeds[LOADS[1]] * LOADS[2] / LOADS[1]}

    def goodputs(self, trace: Trace, names: Sequence[str]) -> dict[str, float]:
        found = self.executor.map(goodput, itertools.repeat(trace), names)
        return dict(zip(names, found, strict=True))


def outcome(trace: Trace, name: str, scenario: Scenario) -> Outcome:
    return SimFleet(trace, scenario, entries()[name]).run()


def summary(trace: Trace, name: str, scenario: Scenario) -> Summary:
    return summarise(outcome(trace, name, scenario))


def speed_of_load(trace: Trace, load: float) -> float:
    """How many times as fast the trace must come for the reference's default to have such a load."""
    return _bisect(lambda speed: outcome(trace.faster(speed), "reference", Scenario(STUDY)).load < load)


def goodput(trace: Trace, name: str) -> float:
    """The largest speed at which nine in ten requests are in SLO, as requests a second."""
    speed = _bisect(lambda speed: summary(trace.faster(speed), name, Scenario(STUDY)).in_slo >= IN_SLO)
    return len(trace) / (trace.span_s / speed)


def _bisect(below: Callable[[float], bool], low: float = 0.1, high: float = 64.0) -> float:
    """The largest speed that is `below`, within 0.3 %."""
    while high / low > 1.003:
        middle = (low * high) ** 0.5
        if below(middle):
            low = middle
        else:
            high = middle
    return low


def mean(runs: Sequence[Summary], field: str) -> float:
    """Over the seeds."""
    return statistics.fmean(getattr(run, field) for run in runs)


def described(runs: Runs) -> dict[str, dict[str, float]]:
    """Means over the seeds, and the spread of the mean TTFT: (largest − smallest) / mean."""
    out = {}
    for name, rows in runs.items():
        fields = {field: round(mean(rows, field), 4) for field in HEADS}
        means = [row.mean_s for row in rows]
        out[name] = {**fields, "spread": round((max(means) - min(means)) / statistics.fmean(means), 4)}
    return out


def find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise SystemExit(f"bench.policies: there is no {name}[.gz] in {folder}")


def best_reference(runs: Runs) -> str:
    return min((name for name in REFERENCES if name in runs), key=lambda name: mean(runs[name], "mean_s"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.policies", description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=8, metavar="N")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    traces = {name: read_trace(find(arguments.traces, name)) for name in (CONVERSATION, SYNTHETIC, AZURE)}
    if arguments.quick:
        traces = {name: trace.first(len(trace) // 4) for name, trace in traces.items()}
    with ProcessPoolExecutor(os.cpu_count()) as executor:
        result = measure(Bench(executor, range(1 if arguments.quick else arguments.seeds), arguments.quick), traces)
    result["seconds"] = round(time.monotonic() - started, 1)
    finish("policies", result)


def measure(bench: Bench, traces: dict[str, Trace]) -> dict[str, Any]:
    """Everything, in the order in which the figures depend on each other."""
    result: dict[str, Any] = {"quick": bench.quick, "seeds": len(bench.seeds), "setting": "docs/routing.md"}
    conversation = traces[CONVERSATION]
    names = [name for name in entries() if name != "reference-local"]
    speeds = bench.speeds(conversation)
    result["speeds"] = {f"{load:.0%}": round(speed, 4) for load, speed in speeds.items()}
    by_load: dict[float, Runs] = {}
    for load, speed in speeds.items():
        progress(f"conversation at {load:.0%} of the reference's prefill time")
        by_load[load] = bench.run(conversation.faster(speed), Scenario(STUDY), names)
    result["conversation"] = {f"{load:.0%}": described(runs) for load, runs in by_load.items()}
    result["reproduced"] = None if bench.quick else reproduced({load: by_load[load] for load in LOADS[:2]})
    result["clairvoyant"] = {}
    for load, speed in speeds.items():
        bound = clairvoyant_s(conversation.faster(speed), STUDY, 8)
        result["clairvoyant"][f"{load:.0%}"] = {
            "mean_s": round(statistics.fmean(bound), 4),
            **{f"p{share * 100:.0f}_s": round(percentile(bound, share), 4) for share in (0.5, 0.9, 0.99)},
        }
    at_90 = conversation.faster(speeds[0.9])
    few = ["round-robin", "mooncake", "reference", "reference-wspt-0", OURS]
    result["links"] = {}
    for name, rate in LINKS.items():
        progress(f"conversation at 90 %, {name}")
        runs = bench.run(at_90, Scenario(STUDY, link_bytes_per_s=rate), few, range(1))
        result["links"][name] = described(runs)
    progress("conversation at 90 %, 20 % error of times, state 100 ms old")
    noisy = bench.run(at_90, Scenario(STUDY, noise=0.2, stale_s=0.1), few)
    result["noisy"] = described(noisy)
    progress("conversation at 90 %, decode workers keep caches and may compute prompts")
    helping = Scenario(STUDY, decode_cache_tokens=STUDY.cache_tokens, local_prefill_tokens=2048, itl_objective_s=0.1)
    result["decode helps"] = described(bench.run(at_90, helping, ["reference-local", OURS], range(1)))
    result["synthetic"] = synthetic(bench, traces[SYNTHETIC], few)
    spikes, spike_p99 = azure(bench, traces[AZURE])
    result["azure code"] = spikes
    best = best_reference(by_load[0.9])
    goodputs: dict[str, float] = {}
    if not bench.quick:
        progress("goodput by bisection")
        goodputs = bench.goodputs(conversation, ("round-robin", "mooncake", *REFERENCES, OURS))
        result["goodput_rps"] = {name: round(rate, 3) for name, rate in goodputs.items()}
    result["best reference"] = best
    result["marks"] = marks(by_load[0.9], best, noisy, result["clairvoyant"]["90%"]["mean_s"], goodputs, spike_p99)
    if result["reproduced"]:
        # No ratio counts before these rows are near those that were published.
        for name, field in (("published_means", "means_within"), ("published_figures", "within")):
            share = mark(result["reproduced"][field], 1.0, "share", at_most=False)
            result["marks"][f"{name}_within_15_percent"] = share
    plot(conversation.name, at_90, by_load, speeds)
    return result


def synthetic(bench: Bench, trace: Trace, names: Sequence[str]) -> dict[str, Any]:
    speeds = bench.speeds(trace)
    progress("synthetic trace at 90 %")
    return {"speed": round(speeds[0.9], 4), **described(bench.run(trace.faster(speeds[0.9]), Scenario(STUDY), names))}


def azure(bench: Bench, trace: Trace) -> tuple[dict[str, Any], float]:
    """At its own pace, in which it comes in spikes; prompts share no prefixes."""
    progress("Azure code trace at its own pace")
    names = ["least-loaded", "reference", "reference-wspt-0", OURS]
    runs = bench.run(trace, Scenario(STUDY), names, range(1))
    helping = Scenario(STUDY, local_prefill_tokens=2048, itl_objective_s=0.1)
    helped = bench.run(trace, helping, [OURS], range(1))
    ratio = mean(runs[OURS], "p99_s") / mean(runs["least-loaded"], "p99_s")
    return {"own pace": described(runs), "own pace, decode helps": described(helped)}, ratio


def marks(
    runs: Runs, best: str, noisy: Runs, clairvoyant: float, goodputs: dict[str, float], spike_p99: float
) -> dict[str, Any]:
    def ratio(field: str, other: str) -> float:
        return mean(runs[OURS], field) / mean(runs[other], field)

    table_best = "reference-wspt-1"
    held = {
        "mean_ttft_vs_reference": mark(ratio("mean_s", "reference"), 0.5, "ratio", at_most=True),
        "mean_ttft_vs_reference_best": mark(ratio("mean_s", best), 0.65, "ratio", at_most=True),
        "mean_ttft_vs_reference_best_of_table": mark(ratio("mean_s", table_best), 0.65, "ratio", at_most=True),
        "p99_vs_reference": mark(ratio("p99_s", "reference"), 1.0, "ratio", at_most=True),
        "mean_ttft_noisy_vs_reference": mark(
            mean(noisy[OURS], "mean_s") / mean(noisy["reference"], "mean_s"), 0.6, "ratio", at_most=True
        ),
        "spike_p99_vs_least_loaded": mark(spike_p99, 0.6, "ratio", at_most=True),
    }
    if goodputs:
        most = max(goodputs[name] for name in REFERENCES)
        held["goodput_vs_reference"] = mark(goodputs[OURS] / goodputs["reference"], 1.6, "ratio", at_most=False)
        held["goodput_vs_reference_best"] = mark(goodputs[OURS] / most, 1.25, "ratio", at_most=False)
    held["mean_ttft_vs_clairvoyant"] = {"value": round(mean(runs[OURS], "mean_s") / clairvoyant, 3), "unit": "ratio"}
    return held


def plot(name: str, at_90: Trace, by_load: dict[float, Runs], speeds: dict[float, float]) -> None:
    shown = [OURS, "mooncake", "reference-wspt-0", "reference", "llm-d"]
    outcomes = [outcome(at_90, policy, Scenario(STUDY)) for policy in shown]
    summaries = {speeds[load]: [by_load[load][policy][0] for policy in shown] for load in LOADS}
    path = RESULTS / "policies.png"
    if draw(path, f"{name} at 90 % of the reference's prefill time", outcomes, summaries):
        progress("plot: bench/results/policies.png")


if __name__ == "__main__":
    main()
