"""The fleet and the trace of `bench.live`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.report import median, progress
from headway.core.predict import Coefficients, Predictor
from headway.core.step import StepLimits
from headway.replay.drive import Seen
from headway.replay.live import Live, replay
from headway.replay.seen import gaps, ttfts
from headway.sim.fleet import SimFleet
from headway.sim.hardware import STUDY, Linear
from headway.sim.policies import Entry, entries
from headway.sim.scenario import Outcome, Scenario
from headway.sim.summary import percentile
from headway.sim.trace import Trace, TraceRequest, read_trace

TRACE = "mooncake_conversation_trace.jsonl"
# Of the trace's clock: it has no times in between.
TICK_S = 3.0
SESSIONS, SPEED = 8, 20.0
# The study's prefill workers, so many times as fast. The first loads the reference's to nine tenths, the second ours to
# the brim, where queues are long.
USUAL, HEAVY = 3.3, 1.9
# Where queues decide; shorter times are those of single forwards and messages.
LEAST_TTFT_S = 0.2
# Of the simulator: where a policy draws lots, one run is not like another; the median of these is compared.
SEEDS = range(7)
# Room for what runs at once beside the cache: requests that wait for slots are nothing that the simulator knows.
NODE_TOKENS = 2_560_000
# Percentiles that are compared.
SHARES = (0.5, 0.9)
LINK_S, LINK_BYTES_PER_S = 0.01, 1e9


def hardware(times: float) -> Linear:
    """A decode step takes 40 ms, so that two cores can carry eight workers, a router and the clients."""
    _, b, c = STUDY.predictor.prefill
    predictor = Predictor((0.005, b / times, c / times), (0.04, 2e-4, 0.0))
    return Linear("live", "the study's, faster", predictor, token_bytes=8, cache_tokens=NODE_TOKENS, batch=64)


def scenario(times: float, **changes: Any) -> Scenario:
    """4 prefill and 4 decode workers on 4 nodes, prompts in chunks."""
    made = Scenario(
        hardware(times),
        prefill=4,
        decode=4,
        nodes=4,
        limits=StepLimits(batch=64, chunk_tokens=1 << 20, chunk_s=0.25, shared_chunk_s=0.05),
        link_bytes_per_s=LINK_BYTES_PER_S,
        link_latency_s=LINK_S,
        local_prefill_tokens=2048,
        itl_objective_s=0.15,
    )
    return replace(made, **changes)


def slowed(where: Scenario, factor: float) -> Scenario:
    """The same in slow motion: all that is simulated takes so many times as long; what the services do does not."""
    hardware, limits, objective = where.hardware, where.limits, where.objective
    assert isinstance(hardware, Linear)
    prefill, step = (_times(these, factor) for these in (hardware.predictor.prefill, hardware.predictor.step))
    return replace(
        where,
        hardware=replace(hardware, predictor=Predictor(prefill, step)),
        limits=replace(limits, chunk_s=limits.chunk_s * factor, shared_chunk_s=limits.shared_chunk_s * factor),
        link_bytes_per_s=where.link_bytes_per_s / factor,
        link_latency_s=where.link_latency_s * factor,
        itl_objective_s=where.itl_objective_s * factor,
        objective=objective and replace(objective, base_s=objective.base_s * factor),
    )


def _times(coefficients: Coefficients, factor: float) -> Coefficients:
    a, b, c = coefficients
    return a * factor, b * factor, c * factor


def find_trace(folder: Path, *, quick: bool) -> Trace:
    """Every eighth session, whole, 20 times as fast; the first 20 seconds of that for a quick run."""
    for path in (folder / TRACE, folder / f"{TRACE}.gz"):
        if path.exists():
            trace = spread(read_trace(path).every(SESSIONS)).faster(SPEED)
            return until(trace, 20.0) if quick else trace
    raise SystemExit(f"bench.live: there is no {TRACE}[.gz] in {folder}")


def spread(trace: Trace) -> Trace:
    """Requests of one tick of the trace's clock, in their order evenly over it. Where they come at once, their order at
    the router is that of the network, and round-robin another policy each time.
    """
    ticks: dict[float, list[TraceRequest]] = {}
    for request in trace.requests:
        ticks.setdefault(request.arrival_s, []).append(request)
    evenly = [
        replace(request, arrival_s=start_s + TICK_S * at / len(together))
        for start_s, together in ticks.items()
        for at, request in enumerate(together)
    ]
    return replace(trace, requests=evenly)


def until(trace: Trace, seconds: float) -> Trace:
    return replace(trace, requests=[request for request in trace.requests if request.arrival_s <= seconds])


@dataclass
class Run:
    """A policy on a trace, live and simulated (with each seed)."""

    name: str
    seen: list[Seen]
    outcomes: Sequence[Outcome]

    @property
    def outcome(self) -> Outcome:
        """With the first seed."""
        return self.outcomes[0]

    def row(self) -> dict[str, Any]:
        live, simulated = ttfts(self.seen), simulated_ttfts(self.outcome)
        steps = gaps(self.seen)
        return {
            "live": _ttft(live),
            "simulated": _ttft(simulated),
            "simulated load": round(self.load, 3),
            "live p50, p90, of 0.2 s and more": _rounded(_long(ttfts(self.seen))),
            "simulated p50, p90, of 0.2 s and more, by seed": [_rounded(pair) for pair in self._simulated()],
            "itl_p50_ms": round(percentile(steps, 0.5) * 1e3, 1),
            "itl_p99_ms": round(percentile(steps, 0.99) * 1e3, 1),
            "failed": sum(not one.ok for one in self.seen),
            "sent late p99": round(percentile(sorted(one.late_s for one in self.seen), 0.99), 4),
            "error p50, p90": [round(value, 3) for value in self.errors()],
            "p90 over unloaded": round(self.p90_over_unloaded(), 2),
        }

    @property
    def mean_s(self) -> float:
        times = ttfts(self.seen)
        return sum(times) / len(times)

    @property
    def load(self) -> float:
        return median([outcome.load for outcome in self.outcomes])

    def errors(self) -> list[float]:
        """live / simulated − 1 at p50 and p90, of requests whose TTFT was at least 200 ms."""
        simulated = [median(values) for values in zip(*self._simulated(), strict=True)]
        return [here / there - 1 for here, there in zip(_long(ttfts(self.seen)), simulated, strict=True)]

    def p90_over_unloaded(self) -> float:
        """Simulated p90 over that of what each request had to compute, without any waiting."""
        return median([_p90_over_unloaded(outcome) for outcome in self.outcomes])

    def _simulated(self) -> list[list[float]]:
        return [_long(simulated_ttfts(outcome)) for outcome in self.outcomes]


def simulated_ttfts(outcome: Outcome) -> list[float]:
    """Sorted seconds."""
    return sorted(sequence.ttft_s or 0.0 for sequence in outcome.sequences)


def _long(times: Iterable[float]) -> list[float]:
    """p50 and p90 of those where queues decide."""
    long = [time for time in times if time >= LEAST_TTFT_S]
    return [percentile(long, share) for share in SHARES]


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 3) for value in values]


def _p90_over_unloaded(outcome: Outcome) -> float:
    machine = outcome.scenario.hardware
    alone = sorted(machine.prefill_s(s.request.prompt_tokens - s.cached, s.cached) for s in outcome.sequences)
    return percentile(simulated_ttfts(outcome), 0.9) / percentile(alone, 0.9)


def _ttft(times: list[float]) -> dict[str, float]:
    shares = {f"p{share * 100:.0f}_s": round(percentile(times, share), 3) for share in (0.5, 0.9, 0.99)}
    return {"mean_s": round(sum(times) / len(times), 3), **shares}


def run(name: str, trace: Trace, where: Scenario, routers: int = 1, policy: str = "headway") -> Run:
    """Live, then simulated."""
    entry: Entry = entries()[policy]
    progress(f"{name}: {len(trace)} requests in {trace.span_s:.0f} s")
    seen = replay(trace, Live(where, entry, routers), on_done=lambda _: None)
    made = Run(name, seen, [SimFleet(trace, replace(where, seed=seed), entry).run() for seed in SEEDS])
    progress(f"  {made.row()}")
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="parts, separated by commas")
