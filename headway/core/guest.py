"""Guests: prompts that are computed between two layers of a longer one's chunk, because they go before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Generic

from headway.core.order import Order
from headway.core.predict import Predictor
from headway.core.step import S, StepLimits, Work, plan_step, prompt_key, prompts_s


@dataclass(slots=True)
class Host(Generic[S]):
    """A forward of prompts, beside which nothing decodes, that runs since `started_s`.

    own_s: what it should take by itself. guests_s: what guests took of its time so far.
    """

    work: Sequence[Work[S]]
    own_s: float
    started_s: float
    guests_s: float = 0.0

    def left_s(self, now_s: float) -> float:
        """Until its end, if no other guest comes."""
        return max(0.0, self.own_s - (now_s - self.started_s - self.guests_s))

    def done(self, now_s: float) -> float:
        """The share of its work that should be computed."""
        return 1 - self.left_s(now_s) / self.own_s if self.own_s > 0 else 1.0


def plan_guest(
    host: Host[S],
    ready: Sequence[S],
    now_s: float,
    limits: StepLimits,
    predictor: Predictor,
    order: Order,
    debts: Mapping[str, float],
    within_s: float = math.inf,
) -> list[Work[S]]:
    """Of those that became ready since the host began the prompts to compute now, each to its end; empty when the host
    had better go on.

    They go before all that the host computes, and take less than what is left of it: one that takes longer gains less
    by it than the host loses. within_s: what the host may take in all, with its guests.
    """
    left_s = host.left_s(now_s)
    most_s = min(left_s, within_s - (now_s - host.started_s) - left_s)
    fixed_s, done = predictor.prefill[0], host.done(now_s)
    if most_s <= fixed_s:
        return []
    first = min(prompt_key(item.sequence, predictor, order, debts, int(item.count * done)) for item in host.work)
    before = [
        sequence
        for sequence in ready
        if not sequence.decoding and prompt_key(sequence, predictor, order, debts) < first
    ]
    work = plan_step(before, replace(limits, chunk_s=most_s - fixed_s), predictor, order, debts)
    work = list(takewhile(lambda item: item.draws, work))
    return work if work and prompts_s(work, predictor) < most_s else []
