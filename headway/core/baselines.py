"""The field's routing policies, to compare ours with: each as its project's code or paper states it (docs/routing.md).

What they know is what they would know there: cached prefixes from block events, and the requests that they sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence

from headway.core.ask import Ask
from headway.core.load import Role
from headway.core.policy import Candidate, Planner, Policy, Way

# A number in [0, 1), for ties and for chance.
Draw = Callable[[], float]


class Simple(ABC):
    """Picks the candidate with the smallest cost, ties by lot; no pulls."""

    def __init__(self, planner: Planner, draw: Draw) -> None:
        self._planner = planner
        self._draw = draw

    @abstractmethod
    def cost(self, ask: Ask, candidate: Candidate) -> float:
        """Smaller is better."""

    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        chosen = min(candidates, key=lambda candidate: (self.cost(ask, candidate), self._draw()))
        return self._planner.compute(ask, (chosen[0], self.counted(ask, chosen)), now_s)

    def counted(self, ask: Ask, candidate: Candidate) -> int:
        """Tokens that its own book-keeping takes as cached there."""
        return resident(ask, candidate)


def resident(ask: Ask, candidate: Candidate) -> int:
    """Tokens that the candidate's node holds now."""
    return min(ask.resident.get(candidate[0].node, 0), ask.prompt_tokens - 1)


class RoundRobin(Simple):
    """Whose turn it is; among equals by name, so that a round is the same every time."""

    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        turn = min(candidates, key=lambda candidate: (candidate[0].sent, candidate[0].worker_id))
        return super().pick(ask, [turn], now_s)

    def cost(self, ask: Ask, candidate: Candidate) -> float:
        return candidate[0].sent


class Random(Simple):
    def cost(self, ask: Ask, candidate: Candidate) -> float:
        return 0.0


class LeastTokens(Simple):
    """Fewest tokens queued, cached or not."""

    def cost(self, ask: Ask, candidate: Candidate) -> float:
        return candidate[0].backlog.tokens

    def counted(self, ask: Ask, candidate: Candidate) -> int:
        return 0


class PowerOfTwo(LeastTokens):
    """The less loaded of two drawn by lot (Mitzenmacher, 2001)."""

    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        two = sorted(candidates, key=lambda _: self._draw())[:2]
        return super().pick(ask, two, now_s)


class PrefixAffinity(Simple):
    """Most of the prefix, whatever the load; fewest requests where several hold as much."""

    def cost(self, ask: Ask, candidate: Candidate) -> float:
        return len(candidate[0].backlog) - 1e6 * resident(ask, candidate)


class SgLang:
    """cache_aware: fewest requests when unbalanced, else the largest match if over half of the prompt, else the
    smallest tree. A request counts until its answer ends. Trees hold what the router sent, not what workers have: at
    most 2²⁴ tokens.
    """

    imbalance, factor, share = 32, 1.1, 0.5
    most_tokens = 1 << 24

    def __init__(self, planner: Planner, draw: Draw) -> None:
        self._planner = planner
        self._draw = draw
        self._trees: dict[str, OrderedDict[bytes, None]] = {}

    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        block_size = self._planner.block_size
        counts = [candidate[0].in_flight for candidate in candidates]
        trees = [self._trees.setdefault(candidate[0].worker_id, OrderedDict()) for candidate in candidates]
        matches = [_leading(ask.keys, tree) for tree in trees]
        if max(counts) - min(counts) > self.imbalance and max(counts) > self.factor * min(counts):
            costs: Sequence[float] = counts
        elif max(matches) * block_size > self.share * ask.prompt_tokens:
            costs = [-match for match in matches]
        else:
            costs = [len(tree) for tree in trees]
        at = min(range(len(candidates)), key=lambda at: (costs[at], self._draw()))
        for key in reversed(ask.keys):
            trees[at][key] = None
            trees[at].move_to_end(key)
        while len(trees[at]) * block_size > self.most_tokens:
            trees[at].popitem(last=False)
        chosen = candidates[at]
        return self._planner.compute(ask, (chosen[0], resident(ask, chosen)), now_s)


def _leading(keys: Sequence[bytes], tree: Container[bytes]) -> int:
    count = 0
    for key in keys:
        if key not in tree:
            break
        count += 1
    return count


class LlmD(Simple):
    """Scores of 0..1, weighted: prefix 2, queue 1 (those of its prefill profile)."""

    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        queues = [len(candidate[0].backlog) for candidate in candidates]
        self._least, self._most = min(queues), max(queues)
        return super().pick(ask, candidates, now_s)

    def cost(self, ask: Ask, candidate: Candidate) -> float:
        spread = self._most - self._least
        queue = (self._most - len(candidate[0].backlog)) / spread if spread else 1.0
        return -(2 * resident(ask, candidate) / ask.prompt_tokens + queue)


class Reference(Simple):
    """Dynamo's, prefill pool: (queued uncached + own uncached tokens) in blocks, smallest first."""

    def cost(self, ask: Ask, candidate: Candidate) -> float:
        uncached = ask.prompt_tokens - resident(ask, candidate)
        return (candidate[0].backlog.tokens + uncached) // self._planner.block_size


class ReferenceLocal(Reference):
    """With its conditional disaggregation: the decode worker with the fewest KV blocks computes the prompt where under
    2,048 tokens, and under 0.7 of the prompt, are left to compute there.
    """

    most, share = 2048, 0.7

    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        decodes = [candidate for candidate in candidates if candidate[0].role is not Role.PREFILL]
        if decodes:
            least = min(decodes, key=lambda candidate: (candidate[0].memory.committed_tokens, self._draw()))
            left = ask.prompt_tokens - resident(ask, least)
            if left < self.most and left < self.share * ask.prompt_tokens:
                return self._planner.compute(ask, least, now_s)
        prefills = [candidate for candidate in candidates if candidate[0].role is Role.PREFILL]
        return super().pick(ask, prefills or candidates, now_s)


class Mooncake:
    """Algorithm 1 of its paper (FAST 2025): transfer the longest prefix where it is over 1.5 times the local one; least
    T_transfer + T_queue + T_prefill.
    """

    threshold = 1.5

    def __init__(self, planner: Planner, draw: Draw) -> None:
        self._planner = planner
        self._draw = draw

    def pick(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way:
        tokens, holders = self._planner.sources(ask)
        ways = []
        for candidate in candidates:
            own = resident(ask, candidate)
            local = (candidate[0], own)
            if tokens > self.threshold * own and tokens > own:
                ways.append(self._planner.pull(ask, local, holders[0], tokens, now_s))
            else:
                ways.append(self._planner.compute(ask, local, now_s))
        return min(ways, key=lambda way: (way.pull_s + way.wait_s + way.compute_s, self._draw()))


BASELINES: dict[str, Callable[[Planner, Draw], Policy]] = {
    "round-robin": RoundRobin,
    "random": Random,
    "power-of-two": PowerOfTwo,
    "least-loaded": LeastTokens,
    "prefix-affinity": PrefixAffinity,
    "sglang": SgLang,
    "llm-d": LlmD,
    "mooncake": Mooncake,
    "reference": Reference,
    "reference-local": ReferenceLocal,
}
