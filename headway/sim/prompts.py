"""The prompts of a simulated worker, in its order."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice

from headway.core.fair import NO_DEBTS, Fairness
from headway.core.order import Key, Order
from headway.core.predict import Predictor
from headway.core.step import StepLimits, Work, plan_step, prompt_key
from headway.sim.node import SimNode
from headway.sim.sequence import SimSequence

# Waiting prompts that one forward looks at, beyond those that it can take.
LOOK_AHEAD = 8


class Prompts:
    """Waits for what is pulled, and plans forwards with core.step.

    `debts`: of the tenants that wait, as of the last plan; see core.fair.
    """

    def __init__(self, node: SimNode, block_size: int, predictor: Predictor, limits: StepLimits, order: Order) -> None:
        self._node = node
        self._block_size = block_size
        self._predictor = predictor
        self._limits = limits
        self._order = order
        self._waiting: list[tuple[Key, int, SimSequence]] = []
        self._tenants: Counter[str] = Counter()
        self._fairness = Fairness()
        self.debts: Mapping[str, float] = NO_DEBTS

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: SimSequence) -> None:
        """Its `computed` is what is thought to be cached, until the cache says how much there is."""
        sequence.key = prompt_key(sequence, self._predictor, self._order)
        insort(self._waiting, (sequence.key, sequence.number, sequence))
        self._tenants[sequence.tenant] += 1

    def remove(self, sequence: SimSequence) -> None:
        self._waiting.remove((sequence.key, sequence.number, sequence))
        self._tenants[sequence.tenant] -= 1
        if not self._tenants[sequence.tenant]:
            del self._tenants[sequence.tenant]

    def charge(self, tenant: str, seconds: float) -> None:
        """A prompt of the tenant is computed for so long."""
        self._fairness.charge(tenant, seconds)

    def plan(self, running: Sequence[SimSequence], batch: int) -> list[Work[SimSequence]]:
        """Work on prompts for the next forward, beside `running` of a `batch` that decode; empty when none is ready."""
        most = self._limits.batch + LOOK_AHEAD
        self.debts = self._fairness.debts(self._tenants)
        while True:
            landed = (sequence for _, _, sequence in self._waiting if sequence.landed)
            # Debts change the order in which they are kept.
            ready = list(landed) if self.debts else list(islice(landed, most))
            if not ready:
                return []
            work = plan_step([*running, *ready], self._limits, self._predictor, self._order, self.debts)[batch:]
            # Until the plan agrees with what the cache has.
            if not [item for item in work if self._refresh(item.sequence)]:
                return work

    def start(self, item: Work[SimSequence], now_s: float) -> None:
        """Its first chunk is computed now, and its cached prefix read."""
        sequence = item.sequence
        sequence.started_s = now_s
        sequence.cached = item.start
        self._node.use(sequence.request.keys[: -(-item.start // self._block_size)])

    def computed(self, item: Work[SimSequence]) -> None:
        """What was planned is done; full blocks are cached from now on, with the last chunk all of them."""
        sequence = item.sequence
        self.remove(sequence)
        sequence.computed = item.start + item.count
        keys = sequence.request.keys
        if item.draws:
            self._node.add(keys)
            self._refresh_siblings(keys)
        else:
            self._node.add(keys[: sequence.computed // self._block_size])
            self.add(sequence)

    def _refresh_siblings(self, keys: Sequence[bytes]) -> None:
        """Those that go on like the prompt that was just computed are shorter now."""
        for _, _, other in list(self._waiting):
            at = other.computed // self._block_size
            if at < min(len(keys), len(other.request.keys)) and other.request.keys[at] == keys[at]:
                self._refresh(other)

    def _refresh(self, sequence: SimSequence) -> bool:
        """Whether its place in the queue changed, because the cache has more or less than was thought."""
        if sequence.started_s is not None:
            return False
        blocks = self._node.leading(sequence.request.keys)
        computed = min(blocks * self._block_size, sequence.request.prompt_tokens - 1)
        if computed == sequence.computed:
            return False
        self.remove(sequence)
        sequence.computed = computed
        self.add(sequence)
        return True
