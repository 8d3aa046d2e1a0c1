"""Which worker computes a prompt: the policy, and the interface that the field's policies (core.baselines) share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from headway.core.ask import Ask
from headway.core.links import Links
from headway.core.load import WorkerLoad
from headway.core.order import Key

# What a second of a stream that stands still counts for against a second of a first token that is waited for.
STREAM_WEIGHT = 0.25
# Costs that differ by less than this share of them are the same: predictions are no better than that, and a worker
# that once looked a little slower would never show that it is not.
EQUAL = 0.02
# So many times the least cost a worker's may be that has got nothing yet, where it need not compute more: what it
# measured of itself while it started is worth less than a try.
UNTRIED = 1.25
# What a second of a worker's time counts for, beside the delays that can be seen: one who computes what a sibling is
# about to have computed is served no later, but takes the time from those who come next.
WORK_WEIGHT = 0.1


# A worker that may compute the prompt, and the leading tokens that need not be computed there. A bare pair, because
# each decision makes one for every worker.
Candidate = tuple[WorkerLoad, int]


class Way(NamedTuple):
    """How a worker would do it, in predicted seconds; see core.ask.Option."""

    load: WorkerLoad
    overlap: int
    pull_from: str | None
    key: Key
    wait_s: float
    pull_s: float
    compute_s: float
    delay_s: float
    cost_s: float


def ttft_s(way: Way) -> float:
    """Predicted seconds to the first token."""
    return max(way.wait_s, way.pull_s) + way.compute_s


class Policy(Protocol):
    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        """One of the candidates, of which there is at least one."""


class Planner:
    """Predicts what a candidate would take. `token_bytes`: KV bytes of a token, for pulls; 0 switches pulls off.
    `block_size`: tokens of a block.
    """

    def __init__(self, links: Links, token_bytes: int, block_size: int) -> None:
        self.links = links
        self.token_bytes = token_bytes
        self.block_size = block_size

    def compute(self, ask: Ask, candidate: Candidate, now_s: float) -> Way:
        """With what its node has."""
        return self._way(ask, candidate, candidate[1], None, 0.0, now_s)

    def pull(self, ask: Ask, candidate: Candidate, source: str, tokens: int, now_s: float) -> Way:
        """With `tokens` tokens of the prefix, of which those that its node lacks come from `source`."""
        load = candidate[0]
        link = self.links.between(source, load.node)
        pull_s = link.landing_s(self.pull_bytes(ask, load, tokens), now_s) - now_s
        return self._way(ask, candidate, tokens, source, pull_s, now_s)

    def pull_bytes(self, ask: Ask, load: WorkerLoad, tokens: int) -> int:
        """Of the first `tokens` tokens, what the worker's node does not hold now."""
        return max(0, tokens - ask.resident.get(load.node, 0)) * self.token_bytes

    def best(self, ask: Ask, candidate: Candidate, tokens: int, holders: Sequence[str], now_s: float) -> Way:
        """The cheaper of both; `tokens` and `holders` as from `sources`."""
        load, own = candidate
        if tokens <= own:
            return self.compute(ask, candidate, now_s)
        source = holders[0]
        if len(holders) > 1:
            # So that a hot prefix is not always read from the same node.
            source = min(holders, key=lambda node: self.links.between(node, load.node).free_s)
        pulled = self.pull(ask, candidate, source, tokens, now_s)
        computing_s = load.predictor.prefill_s(ask.prompt_tokens - own, own)
        if pulled.pull_s <= pulled.wait_s or pulled.cost_s <= pulled.wait_s + computing_s:
            # Computing what is there before its turn only takes longer, and its turn does not come sooner by it.
            return pulled
        computed = self.compute(ask, candidate, now_s)
        return pulled if pulled.cost_s < computed.cost_s else computed

    def ways(self, ask: Ask, candidate: Candidate, tokens: int, holders: Sequence[str], now_s: float) -> list[Way]:
        """Computing what its node lacks, and pulling it where that can be; `tokens` and `holders` as from `sources`."""
        found = [self.compute(ask, candidate, now_s)]
        if tokens > candidate[1]:
            found += [self.pull(ask, candidate, holder, tokens, now_s) for holder in holders[:1]]
        return found

    def sources(self, ask: Ask) -> tuple[int, list[str]]:
        """The most tokens that any node holds, and those nodes; none when there are none, or nothing can be pulled."""
        if not self.token_bytes or not ask.resident:
            return 0, []
        most = max(ask.resident.values())
        return min(most, ask.prompt_tokens - 1), [node for node, tokens in ask.resident.items() if tokens == most]

    def _way(
        self, ask: Ask, candidate: Candidate, overlap: int, pull_from: str | None, pull_s: float, now_s: float
    ) -> Way:
        load = candidate[0]
        new = ask.prompt_tokens - overlap
        own_s = load.predictor.prefill_s(new, overlap)
        backlog = load.backlog
        key = backlog.order.key(own_s, new, ask.arrival_s, ask.priority)
        place = backlog.with_debt(key, ask.tenant) if backlog.debts else key
        wait_s, behind = backlog.turn(place, now_s, own_s)
        if ask.promised and pull_from is None:
            wait_s = max(wait_s, ask.awaits(load.worker_id, load.node, overlap).ready_s - now_s)
        compute_s = own_s
        delay_s = own_s * behind
        if load.running > 0:
            # Its chunks share steps with those that decode: each waits for the other.
            compute_s += load.steps_of(new, own_s) * load.step_s()
            delay_s += STREAM_WEIGHT * own_s * load.running
        cost_s = max(wait_s, pull_s) + compute_s + delay_s + WORK_WEIGHT * own_s
        return Way(load, overlap, pull_from, key, wait_s, pull_s, compute_s, delay_s, cost_s)


class LeastDelay:
    """Ours: least predicted time to the first token, plus the delay put on those already there (docs/routing.md).

    The missing prefix is computed or pulled, whichever costs less; a pull runs while the request queues.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        planner = self._planner
        tokens, holders = planner.sources(ask)
        best: Way | None = None
        # Around the least cost so far: what counts as equal to it, and what one that got nothing yet may cost.
        better_s = equal_s = least_s = untried_s = math.inf
        for floor_s, at in self._floors(ask, candidates, tokens, now_s):
            if floor_s > untried_s:
                break
            sent = candidates[at][0].sent
            most_s = equal_s if sent else untried_s
            if floor_s > most_s or (best is not None and floor_s >= better_s and sent >= best.load.sent):
                continue
            if floor_s + self._pushed_s(ask, candidates[at], tokens) > most_s:
                continue
            way = planner.best(ask, candidates[at], tokens, holders, now_s)
            cost_s = way.cost_s
            equal = cost_s <= equal_s
            if not equal and not sent and best is not None:
                equal = cost_s <= untried_s and way.overlap >= best.overlap
            if best is None or cost_s < better_s or (equal and sent < best.load.sent):
                best = way
            if cost_s < least_s:
                least_s, untried_s = cost_s, cost_s * UNTRIED
                better_s, equal_s = cost_s * (1 - EQUAL), cost_s * (1 + EQUAL)
        assert best is not None
        return best

    def _floors(
        self, ask: Ask, candidates: Sequence[Candidate], pullable: int, now_s: float
    ) -> list[tuple[float, int]]:
        """For each candidate, smallest first: seconds below which none of its ways costs, and its place.

        Such a bound is cheap to have, and spares most candidates the full account. `pullable`: tokens, from any node.
        """
        prompt_tokens, alone, stream = ask.prompt_tokens, 1 + WORK_WEIGHT, STREAM_WEIGHT
        floors = []
        for at, (load, own) in enumerate(candidates):
            cached = own if own > pullable else pullable
            new = prompt_tokens - cached
            a, b, c = load.predictor.prefill
            floor_s = (a + b * new + c * new * (cached + new / 2)) * (alone + stream * load.running)
            backlog = load.backlog
            running = backlog.running
            if running is not None and running.ready_s <= now_s:
                left_s = backlog.until_s - now_s
                if left_s > backlog.least_s:
                    floor_s += backlog.least_s
                elif left_s > 0:
                    floor_s += left_s
            floors.append((floor_s, at))
        floors.sort()
        return floors

    def _pushed_s(self, ask: Ask, candidate: Candidate, pullable: int) -> float:
        """What it puts at least on those who wait there: on all of them, if it went first even without any pull."""
        load, own = candidate
        backlog = load.backlog
        first = backlog.first_key
        if first is None:
            return 0.0
        new, prefill_s = ask.prompt_tokens - own, load.predictor.prefill_s
        key = backlog.order.key(prefill_s(new, own), new, ask.arrival_s, ask.priority)
        if (backlog.with_debt(key, ask.tenant) if backlog.debts else key) >= first:
            return 0.0
        cached = max(own, pullable)
        return prefill_s(ask.prompt_tokens - cached, cached) * backlog.waiting
