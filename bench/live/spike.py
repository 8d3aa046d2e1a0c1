"""A spike of ten times the load for five seconds in the middle; and three times what the fleet can do, for a minute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from bench.live.setting import LINK_S, scenario, slowed
from bench.report import progress
from headway.client import Client
from headway.fleet import Fleet
from headway.replay.drive import Replay, Seen
from headway.replay.live import Live, replay
from headway.replay.seen import in_slo
from headway.sim.objective import Objective
from headway.sim.policies import entries
from headway.sim.scenario import Scenario
from headway.sim.summary import percentile
from headway.sim.trace import Trace

# The base load, so many times below that of the other runs: 2.5 such spikes' worth of room is left to drain one.
SLOWER = 2.2
SPIKE, SPIKE_S, SPIKE_AT_S = 10.0, 5.0, 40.0
LONG_S = 100.0
OVERLOAD, OVERLOAD_S = 3.0, 60.0
# A refusal that takes longer than this was no refusal at once: the request counts as admitted, and as missed.
AT_ONCE_S = 0.5
# The longest answer takes a minute and a half.
DEADLINE_S = 240.0
OBJECTIVE = Objective(1.0, 2.0)


@dataclass
class Watch:
    """What the router said while a replay ran: (seconds, predicted seconds until the prefill workers have computed all
    that waits there, were it spread evenly).
    """

    until_s: float
    samples: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, fleet: Fleet, run: Replay) -> None:
        with Client(fleet.address) as client:
            while run.now_s < self.until_s:
                queues_s = [worker.queue_s for worker in client.fleet().workers if worker.role == "prefill"]
                self.samples.append((run.now_s, sum(queues_s) / len(queues_s)))
                time.sleep(0.1)


def with_spike(trace: Trace, at_s: float, seconds: float, factor: float) -> Trace:
    """`factor` · `seconds` of arrivals from `at_s` on come within `seconds`, and the later ones that much sooner."""
    saved = seconds * (factor - 1)

    def moved(arrival_s: float) -> float:
        if arrival_s <= at_s:
            return arrival_s
        if arrival_s <= at_s + factor * seconds:
            return at_s + (arrival_s - at_s) / factor
        return arrival_s - saved

    return replace(trace, requests=[replace(r, arrival_s=moved(r.arrival_s)) for r in trace.requests])


def admitted(seen: Sequence[Seen]) -> list[Seen]:
    """All but those that were refused at once."""
    return [
        one
        for one in seen
        if one.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or one.ended_s is None or one.ended_s > AT_ONCE_S
    ]


def hung(seen: Sequence[Seen]) -> int:
    """Those that had no end within their deadline."""
    return sum(one.code is grpc.StatusCode.DEADLINE_EXCEEDED for one in seen)


def in_time(seen: Sequence[Seen], where: Scenario) -> list[Seen]:
    return [one for one in in_slo(seen, where.hardware, where.objective or OBJECTIVE) if one.ok]


def spike(trace: Trace, times: float, slower: float = 1.0) -> dict[str, Any]:
    """Streams that run when the spike comes keep their pace; what is admitted is in time; the queue drains.

    slower: all in slow motion, the spike too. The cores have so many times less to do in a second, so that what
    is seen is the policy and the services, and not a machine that is busy.
    """
    at_s, spike_s, long_s = SPIKE_AT_S * slower, SPIKE_S * slower, LONG_S * slower
    base = trace.faster(1 / SLOWER / slower)
    spiked = with_spike(base, at_s, spike_s, SPIKE)
    spiked = replace(spiked, requests=[r for r in spiked.requests if r.arrival_s <= long_s])
    watch = Watch(long_s)
    where = slowed(scenario(times, itl_objective_s=0.055, objective=OBJECTIVE), slower)
    progress(f"spike: {len(spiked)} requests in {spiked.span_s:.0f} s")
    live = Live(where, entries()["headway"], deadline_s=DEADLINE_S * slower)
    seen = replay(spiked, live, during=watch, on_done=lambda _: None)
    let_in, good = admitted(seen), in_time(seen, where)
    end_s = at_s + spike_s
    before, during = running_gaps(seen, at_s, at_s, spike_s)
    usual_s = percentile(sorted(queue_s for at, queue_s in watch.samples if at < at_s), 0.95)
    peak_at_s, backlog_s = max((s for s in watch.samples if at_s <= s[0] <= end_s + 1), key=lambda s: s[1])
    drained_s = next((at - peak_at_s for at, left_s in watch.samples if at > peak_at_s and left_s <= usual_s), long_s)
    return {
        "requests": len(seen),
        "refused at once": len(seen) - len(let_in),
        "admitted_in_slo": len(good) / len(let_in),
        "itl_p99_before_ms": round(percentile(before, 0.99) * 1e3, 1),
        "itl_p99_during_ms": round(percentile(during, 0.99) * 1e3, 1),
        "itl_p99_ratio": percentile(during, 0.99) / percentile(before, 0.99),
        "backlog_s": round(backlog_s, 2),
        "drained_s": round(drained_s, 2),
        "drained_vs_backlog": drained_s / max(backlog_s, LINK_S),
        "hung": hung(seen),
        "other failures": sorted({one.details for one in seen if not one.ok and one.code.name != "RESOURCE_EXHAUSTED"}),
    }


def running_gaps(seen: Sequence[Seen], at_s: float, from_s: float, seconds: float) -> tuple[list[float], list[float]]:
    """Sorted gaps of streams that run at `at_s`: in the `seconds` before, and from then on for as long."""
    before: list[float] = []
    during: list[float] = []
    for one in seen:
        if one.first_token_s is None or one.first_token_s >= at_s or (one.finished_s or at_s) < at_s:
            continue
        for gap, at in zip(one.gaps_s, one.token_times_s[1:], strict=True):
            if from_s - seconds <= at < from_s:
                before.append(gap)
            elif from_s <= at < from_s + seconds:
                during.append(gap)
    return sorted(before), sorted(during)


def overload(trace: Trace, times: float) -> dict[str, Any]:
    """Goodput at three times the load, over that at the load itself."""
    rates = {}
    for name, factor in (("at capacity", 1.0), ("overload", OVERLOAD)):
        faster = trace.faster(factor)
        part = replace(faster, requests=[r for r in faster.requests if r.arrival_s <= OVERLOAD_S])
        progress(f"{name}: {len(part)} requests in {OVERLOAD_S:.0f} s")
        where = scenario(times, objective=OBJECTIVE)
        seen = replay(part, Live(where, entries()["headway"], deadline_s=DEADLINE_S), on_done=lambda _: None)
        good = in_time(seen, where)
        rates[name] = {
            "requests": len(seen),
            "in_time_per_s": round(len(good) / OVERLOAD_S, 3),
            "tokens_in_time_per_s": round(sum(one.request.prompt_tokens for one in good) / OVERLOAD_S),
            "admitted_in_slo": round(len(good) / max(1, len(admitted(seen))), 4),
            "hung": hung(seen),
        }
        progress(f"  {rates[name]}")
    # By requests and by their tokens: the one alone could be had with short prompts only.
    ratios = [rates["overload"][key] / rates["at capacity"][key] for key in ("in_time_per_s", "tokens_in_time_per_s")]
    return {**rates, "goodput_ratio": min(ratios)}
