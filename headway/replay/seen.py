"""What clients saw of a replay, in the same terms as what the simulator says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headway.replay.drive import Seen
from headway.sim.hardware import Hardware
from headway.sim.objective import Objective
from headway.sim.scenario import Outcome
from headway.sim.summary import percentile, summarise

SUMMARY_HEADS = ["policy", "", "mean", "p50", "p90", "p99", "ITL p50", "ITL p99", "hit", "in SLO", "failed"]


def ttfts(seen: Sequence[Seen]) -> list[float]:
    """Sorted seconds of those that got a first token."""
    return sorted(one.ttft_s for one in seen if one.ttft_s is not None)


def gaps(seen: Sequence[Seen]) -> list[float]:
    """Sorted seconds between messages with tokens, of all answers."""
    return sorted(gap for one in seen for gap in one.gaps_s)


def in_slo(seen: Sequence[Seen], hardware: Hardware, objective: Objective) -> list[Seen]:
    """Those whose first token came within the objective."""
    return [one for one in seen if objective.met(one.request, one.ttft_s, hardware)]


def live_row(policy: str, seen: Sequence[Seen], hardware: Hardware, objective: Objective) -> list[Any]:
    times, steps = ttfts(seen), gaps(seen)
    prompt_tokens = sum(one.request.prompt_tokens for one in seen if one.ok)
    hit = sum(one.cached_tokens for one in seen if one.ok) / prompt_tokens if prompt_tokens else 0.0
    share = len(in_slo(seen, hardware, objective)) / len(seen)
    failed = sum(not one.ok for one in seen)
    mean_s = sum(times) / len(times) if times else 0.0
    shares = (percentile(times, 0.5), percentile(times, 0.9), percentile(times, 0.99))
    return _row(policy, "live", mean_s, shares, percentile(steps, 0.5), percentile(steps, 0.99), hit, share, failed)


def simulated_row(outcome: Outcome, objective: Objective) -> list[Any]:
    s = summarise(outcome, objective)
    shares = (s.p50_s, s.p90_s, s.p99_s)
    return _row(s.policy, "simulated", s.mean_s, shares, s.itl_p50_s, s.itl_p99_s, s.hit, s.in_slo, s.refused)


def _row(
    policy: str,
    kind: str,
    mean_s: float,
    shares: tuple[float, ...],
    itl_p50_s: float,
    itl_p99_s: float,
    hit: float,
    within: float,
    failed: int,
) -> list[Any]:
    times = [f"{seconds:.3f} s" for seconds in (mean_s, *shares)]
    itl = [f"{seconds * 1e3:.0f} ms" for seconds in (itl_p50_s, itl_p99_s)]
    return [policy, kind, *times, *itl, f"{hit:.0%}", f"{within:.0%}", str(failed)]
