"""A simulated worker: the engine loop in virtual time, the same for prefill and decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from headway.core.order import Order
from headway.core.step import StepLimits, Work
from headway.sim.batch import Batch
from headway.sim.clock import Clock
from headway.sim.hardware import Hardware
from headway.sim.node import SimNode
from headway.sim.prompts import Prompts
from headway.sim.sequence import SimSequence

Tell = Callable[[SimSequence], None]


class SimWorker:
    """Computes prompts and decodes, in forwards planned by core.step.

    `on_running`: another prompt than before is computed (the first of a forward); `on_chunk`: a part of a prompt is
    computed, and the rest waits; `on_drawn`: a prompt's first token is there; `on_ended`: its answer is.
    """

    def __init__(
        self,
        name: str,
        node: SimNode,
        clock: Clock,
        hardware: Hardware,
        block_size: int,
        limits: StepLimits,
        order: Order,
        on_running: Tell,
        on_chunk: Tell,
        on_drawn: Tell,
        on_ended: Tell,
    ) -> None:
        self.name = name
        self.node = node
        self.busy_s = 0.0
        self._clock = clock
        self._hardware = hardware
        self._on_running = on_running
        self._on_chunk = on_chunk
        self._on_drawn = on_drawn
        self._on_ended = on_ended
        self._prompts = Prompts(node, block_size, hardware.predictor, limits, order)
        self.batch = Batch(hardware, hardware.cache_tokens)
        # A forward with prompts runs; or a stretch of decode steps does, since `_since_s`. The newest wake-up counts.
        self._in_forward = self._in_stretch = False
        self._since_s = 0.0
        self._wake_up = 0
        self._last: SimSequence | None = None

    @property
    def debts(self) -> Mapping[str, float]:
        """Of the tenants whose prompts wait; see core.fair."""
        return self._prompts.debts

    def submit(self, sequence: SimSequence) -> None:
        """Compute its prompt, as soon as what is pulled for it has landed."""
        sequence.worker = self.name
        self._prompts.add(sequence)
        self.wake()

    def cancel(self, sequence: SimSequence) -> None:
        """Its prompt is not wanted any more; a chunk that is computed now is not stopped."""
        sequence.refused = True
        self._prompts.remove(sequence)

    def join(self, sequence: SimSequence) -> None:
        """Go on with its answer, of at least two tokens."""
        self.batch.join(sequence)
        self.wake()

    def wake(self) -> None:
        """Something may have become ready to run: at once when idle, else between two steps."""
        if self._in_forward:
            return
        if not self._in_stretch:
            self._begin()
        elif not self.batch.full or len(self._prompts):
            self._stretch(self.batch.begun(self._clock.now_s - self._since_s))

    def _begin(self) -> None:
        """The next forward, or the next stretch of steps."""
        self.batch.admit()
        batch = len(self.batch)
        if len(self._prompts):
            work = self._prompts.plan(self.batch.sequences, batch)
            if work:
                self._forward(work)
                return
        if batch:
            self._in_stretch = True
            self._since_s = self._clock.now_s
            self._stretch(self.batch.left)

    def _stretch(self, steps: int) -> None:
        seconds = self.batch.seconds(steps)
        self._wake_up += 1
        wake_up = self._wake_up
        self._clock.at(self._since_s + seconds, lambda: self._stretched(wake_up, steps, seconds))

    def _stretched(self, wake_up: int, steps: int, seconds: float) -> None:
        if wake_up != self._wake_up:
            return
        self._in_stretch = False
        self._in_forward = True
        self._end(self.batch.advance(steps, seconds))
        self._in_forward = False
        self._begin()

    def _forward(self, work: list[Work[SimSequence]]) -> None:
        self._in_forward = True
        if work[0].sequence is not self._last:
            self._last = work[0].sequence
            self._on_running(self._last)
        seconds = 0.0
        fixed_s = self._hardware.prefill_s(1, 0)
        for item in work:
            sequence = item.sequence
            if sequence.started_s is None:
                self._prompts.start(item, self._clock.now_s)
            item_s = self._hardware.prefill_s(item.count, item.start) * sequence.noise
            seconds += max(0.0, item_s - fixed_s) if seconds else item_s
            self._prompts.charge(sequence.tenant, item_s)
        self.busy_s += seconds
        if len(self.batch):
            seconds += self.batch.seconds(1)
        self._clock.after(seconds, lambda: self._forwarded(work, seconds))

    def _forwarded(self, work: list[Work[SimSequence]], seconds: float) -> None:
        if len(self.batch):
            self._end(self.batch.advance(1, seconds))
        for item in work:
            if item.sequence.refused:
                continue
            self._prompts.computed(item)
            if item.draws:
                item.sequence.first_token_s = self._clock.now_s
                self._on_drawn(item.sequence)
            else:
                self._on_chunk(item.sequence)
        self._in_forward = False
        self._begin()

    def _end(self, ended: list[SimSequence]) -> None:
        for sequence in ended:
            sequence.finished_s = self._clock.now_s
            self._on_ended(sequence)
