"""What a run comes down to: percentiles of TTFT and ITL, hit ratio, share within the objective."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headway.sim.hardware import Hardware
from headway.sim.objective import Objective
from headway.sim.scenario import Outcome
from headway.sim.sequence import SimSequence
from headway.sim.trace import Trace, TraceRequest


@dataclass(frozen=True)
class Summary:
    """Times in seconds. `rate`: requests that come a second, `goodput`: those of them within the objective; `in_slo`:
    their share; `hit`: share of prompt tokens that were not computed; `load`: see Outcome; `prediction_error`: median
    of |predicted − TTFT| / TTFT.
    """

    policy: str
    requests: int
    refused: int
    rate: float
    goodput: float
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    hit: float
    in_slo: float
    load: float
    prediction_error: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the sorted values lie (nearest rank); 0 where there is none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def summarise(outcome: Outcome, objective: Objective | None = None) -> Summary:
    objective = objective or Objective()
    sequences = outcome.sequences
    served = [sequence for sequence in sequences if sequence.ttft_s is not None]
    ttft = sorted(sequence.ttft_s or 0.0 for sequence in served)
    prompt_tokens = sum(sequence.request.prompt_tokens for sequence in served)
    errors = sorted(abs(s.predicted_s - (s.ttft_s or 0.0)) / s.ttft_s for s in served if s.ttft_s)
    hardware = outcome.scenario.hardware
    in_time = sum(objective.met(s.request, s.ttft_s, hardware) for s in sequences)
    return Summary(
        policy=outcome.policy,
        requests=len(sequences),
        refused=sum(sequence.refused for sequence in sequences),
        rate=len(sequences) / outcome.span_s if outcome.span_s else 0.0,
        goodput=in_time / outcome.span_s if outcome.span_s else 0.0,
        mean_s=sum(ttft) / len(ttft) if ttft else 0.0,
        p50_s=percentile(ttft, 0.5),
        p90_s=percentile(ttft, 0.9),
        p99_s=percentile(ttft, 0.99),
        itl_p50_s=_weighted(outcome.steps, 0.5),
        itl_p99_s=_weighted(outcome.steps, 0.99),
        hit=sum(sequence.cached for sequence in served) / prompt_tokens if prompt_tokens else 0.0,
        in_slo=in_time / len(sequences) if sequences else 0.0,
        load=outcome.load,
        prediction_error=percentile(errors, 0.5),
    )


def _weighted(steps: Sequence[tuple[float, int]], share: float) -> float:
    """Of (value, weight) pairs."""
    left = share * sum(weight for _, weight in steps)
    for value, weight in sorted(steps):
        left -= weight
        if left <= 0:
            return value
    return 0.0


def waiting_over_time(sequences: Sequence[SimSequence]) -> tuple[list[float], list[int]]:
    """Times, and how many requests waited for their first chunk since then."""
    changes = [(s.arrival_s, 1) for s in sequences if s.started_s is not None]
    changes += [(s.started_s, -1) for s in sequences if s.started_s is not None]
    times, counts, count = [0.0], [0], 0
    for time_s, change in sorted(changes, key=lambda item: (item[0], -item[1])):
        count += change
        times.append(time_s)
        counts.append(count)
    return times, counts


def clairvoyant_s(trace: Trace, hardware: Hardware, workers: int) -> list[float]:
    """TTFTs, sorted, of a fleet that cannot be had: one queue for all, shortest first with exact costs, and one
    infinite cache, into which a prompt's blocks come when its computing starts.
    """
    known: set[bytes] = set()
    waiting = list(reversed(trace.requests))
    queue: list[Any] = []
    ends: list[float] = []
    ttfts: list[float] = []
    now_s = 0.0
    while waiting or queue:
        while waiting and (waiting[-1].arrival_s <= now_s or not queue):
            now_s = max(now_s, waiting[-1].arrival_s)
            queue.append(waiting.pop())
        while ends and ends[0] <= now_s:
            heapq.heappop(ends)
        if len(ends) == workers:
            now_s = min(ends[0], waiting[-1].arrival_s) if waiting else ends[0]
            continue
        costs = [_exact_s(request, known, trace.block_size, hardware) for request in queue]
        at = min(range(len(queue)), key=costs.__getitem__)
        request = queue.pop(at)
        known.update(request.keys)
        heapq.heappush(ends, now_s + costs[at])
        ttfts.append(now_s + costs[at] - request.arrival_s)
    return sorted(ttfts)


def _exact_s(request: TraceRequest, known: set[bytes], block_size: int, hardware: Hardware) -> float:
    cached = 0
    for key in request.keys:
        if key not in known:
            break
        cached += block_size
    cached = min(cached, request.prompt_tokens - 1)
    return hardware.prefill_s(request.prompt_tokens - cached, cached)
