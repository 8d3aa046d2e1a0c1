"""The decoding sequences of a simulated worker, whose steps are computed in closed form between joins and ends."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence

from headway.sim.hardware import Hardware
from headway.sim.sequence import Phase, SimSequence


class Batch:
    """Sequences join between steps while there is room in batch and KV; the others wait in the order they came.

    `steps` collects (seconds of a step, tokens that such steps drew): the inter-token latencies.
    """

    def __init__(self, hardware: Hardware, kv_capacity: int) -> None:
        self.steps: list[tuple[float, int]] = []
        self.kv_tokens = 0
        self._hardware = hardware
        self._kv_capacity = kv_capacity
        self._waiting: deque[SimSequence] = deque()
        # (step number at which it ends, sequence number, sequence)
        self._running: list[tuple[int, int, SimSequence]] = []
        self._step = 0

    def __len__(self) -> int:
        return len(self._running)

    @property
    def sequences(self) -> Sequence[SimSequence]:
        return [sequence for _, _, sequence in self._running]

    @property
    def left(self) -> int:
        """Steps until the first of them ends."""
        return self._running[0][0] - self._step

    @property
    def full(self) -> bool:
        return len(self._running) >= self._hardware.batch

    def join(self, sequence: SimSequence) -> None:
        """Its first token is drawn, more are to come."""
        sequence.phase = Phase.DECODE
        self._waiting.append(sequence)

    def admit(self) -> None:
        """Between two steps: let in who fits."""
        while self._waiting and not self.full:
            request = self._waiting[0].request
            need = request.prompt_tokens + request.output_tokens
            if self._running and self.kv_tokens + need > self._kv_capacity:
                break
            sequence = self._waiting.popleft()
            heapq.heappush(self._running, (self._step + request.output_tokens - 1, sequence.number, sequence))
            self.kv_tokens += request.prompt_tokens + 1

    def seconds(self, steps: int) -> float:
        """Of the next `steps` steps: each draws a token for every sequence, so that each is longer than the last."""
        first_s, growth_s = self._pace()
        return steps * first_s + growth_s * steps * (steps - 1) / 2

    def begun(self, elapsed_s: float) -> int:
        """How many steps have begun after `elapsed_s`; at least one, at most those that are `left`."""
        first_s, growth_s = self._pace()
        if growth_s > 0:
            slope = first_s - growth_s / 2
            steps = math.ceil((math.sqrt(slope * slope + 2 * growth_s * elapsed_s) - slope) / growth_s)
        else:
            steps = math.ceil(elapsed_s / first_s) if first_s > 0 else 1
        return max(1, min(self.left, steps))

    def advance(self, steps: int, seconds: float) -> list[SimSequence]:
        """That many steps are done, in so many seconds; who ended with them."""
        batch = len(self._running)
        self.steps.append((seconds / steps, steps * batch))
        self._step += steps
        self.kv_tokens += steps * batch
        ended = []
        while self._running and self._running[0][0] <= self._step:
            _, _, sequence = heapq.heappop(self._running)
            self.kv_tokens -= sequence.request.prompt_tokens + sequence.request.output_tokens
            ended.append(sequence)
        return ended

    def _pace(self) -> tuple[float, float]:
        """Seconds of the next step, and by how much each one is longer than the one before."""
        batch = len(self._running)
        first_s = self._hardware.step_s(batch, self.kv_tokens)
        return first_s, self._hardware.step_s(batch, self.kv_tokens + batch) - first_s
