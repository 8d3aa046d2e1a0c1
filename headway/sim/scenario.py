"""What a simulated fleet is and what it meets, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headway.core.step import StepLimits
from headway.sim.hardware import Hardware
from headway.sim.objective import Objective
from headway.sim.sequence import SimSequence

# Whole prompts, one after the other.
WHOLE = StepLimits(batch=1, chunk_tokens=1 << 40, chunk_s=math.inf)


@dataclass(frozen=True)
class Scenario:
    """A fleet and its circumstances.

    `nodes` 0: each worker has its own; else workers are dealt to so many in turn, and share their caches.
    `link_bytes_per_s` 0: no pulls. `noise`: sigma of the log-normal error on what computing takes. `stale_s`: how late
    the router hears of what happened at workers. `decode_cache_tokens`: prefix cache of decode workers on nodes of
    their own, filled by handoffs. `local_prefill_tokens`, `itl_objective_s`: see core.place, for ours.
    `objective`: that of every request, which is refused as soon as it cannot be met; None: all are served.
    `max_wait_s`: predicted seconds of a worker's queue, at most.
    `seed`: of ties, chance and noise.
    """

    hardware: Hardware
    prefill: int = 8
    decode: int = 6
    nodes: int = 0
    limits: StepLimits = WHOLE
    link_bytes_per_s: float = 25e9
    link_latency_s: float = 0.0
    noise: float = 0.0
    stale_s: float = 0.0
    decode_cache_tokens: int = 0
    local_prefill_tokens: int = 0
    itl_objective_s: float = math.inf
    objective: Objective | None = None
    max_wait_s: float = math.inf
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a trace.

    `busy_s`: seconds of computing prompts, by worker, prefill workers first; `span_s`: until the last arrival; `steps`:
    (seconds of a decode step, tokens that such steps drew).
    """

    policy: str
    scenario: Scenario
    sequences: Sequence[SimSequence]
    busy_s: Sequence[float]
    span_s: float
    steps: Sequence[tuple[float, int]]

    @property
    def load(self) -> float:
        """What the prefill workers computed, as a share of their time until the last arrival."""
        prefill = self.scenario.prefill
        return sum(self.busy_s[:prefill]) / (prefill * self.span_s) if prefill and self.span_s else 0.0
