"""The engine loop, the same for prefill and decode: plan → forward → apply, over sequences that hold a lease.

Runs on the event loop; only forwards run elsewhere (worker.forwards). From its plan (worker.steps) until `_apply` no
block table that a step uses changes, and none of its slots is given up: for each forward and for each guest by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc

from headway.core.order import Order
from headway.core.sampling import ConstraintError
from headway.core.sequence import Finish, Sequence
from headway.core.step import StepLimits
from headway.core.timings import Timings
from headway.engine.contract import DeviceLost, Drawn, Engine, Matcher
from headway.v1 import common_pb2, kvstore_pb2
from headway.worker.active import Active, Interrupt, Phase, Sink
from headway.worker.attach import Slab
from headway.worker.convert import failure
from headway.worker.cores import Share, yield_to_others
from headway.worker.drafting import Drafting
from headway.worker.forwards import Done, Forwards, Result, Step
from headway.worker.leases import Leases
from headway.worker.lost import check_device
from headway.worker.matchers import Matchers
from headway.worker.steps import Steps

log = logging.getLogger(__name__)

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class EngineLoop:
    """Takes sequences (`start`, `join`, `cancel`), runs them, tells their sinks."""

    def __init__(
        self,
        engine: Engine,
        limits: StepLimits,
        order: Order,
        timings: Timings,
        *,
        growth_tokens: int,
        acquire_timeout_s: float,
        share: Share | None = None,
        matchers: Matchers | None = None,
        drafting: Drafting | None = None,
        on_load: Callable[[], None] = lambda: None,
        on_prompt: Callable[[str], None] = lambda router_id: None,
    ) -> None:
        self._engine = engine
        # None: made when the first constrained sequence comes.
        self._matchers = matchers
        self._on_load = on_load
        # Told on whose behalf a prompt came that can be computed now.
        self._on_prompt = on_prompt
        self._actives: dict[Sequence, Active] = {}
        # Told to expect, by router: nothing is held for them yet.
        self.expected: dict[str, dict[tuple[str, int], Sequence]] = {}
        self.leases = Leases(
            engine.card.kv_format.block_size,
            growth_tokens,
            acquire_timeout_s,
            timings,
            on_ready=self._ready,
            on_refused=self._fail,
            on_preempt=self._preempt,
        )
        self.steps = Steps(limits, order, timings, share, self.leases, drafting)
        self._wake = asyncio.Event()
        self._between_steps = asyncio.Event()
        self._between_steps.set()
        prepare = yield_to_others if share and share.yields else lambda: None
        self._forwards = Forwards(engine, lambda: self.slab is not None, prepare)
        # Planned to run between two layers of the forward that runs, and not applied yet.
        self._guest: Step | None = None
        self.slab: Slab | None = None

    # ------------------------------------------------------------------ attachment

    def attached(self, slab: Slab) -> None:
        self._engine.bind(slab.view)
        self.steps.attached(slab.folder)
        self.slab = slab
        self._on_load()

    async def lost(self) -> None:
        """The kvstore is gone: after the running forward, every sequence fails over; nothing touches the slab after."""
        self.slab = None
        await self._between_steps.wait()
        for active in list(self._actives.values()):
            self._fail(active, failure(UNAVAILABLE, "the kvstore of this node went away", retryable=True))
        self.leases.clear()
        self._engine.unbind()

    def _preempt(self, active: Active) -> None:
        """The store wants the slots back: the sequence starts over when there is room, after the running forward."""
        if active.stepping:
            active.interrupt = active.interrupt or Interrupt.RECLAIM
        else:
            self._restart(active)

    # ------------------------------------------------------------------ commands

    def start(
        self, sequence: Sequence, sink: Sink, *, joiner: str = "", pull: kvstore_pb2.PullBlocks | None = None
    ) -> Active:
        """Compute the sequence from what the cache has, or can fetch; with a joiner, only up to its first token."""
        active = self._watch(Active(sequence, sink, time.monotonic(), joiner, pull=pull))
        if self._may_begin(active):
            self.leases.acquire(active)
            self._on_load()
        return active

    def join(self, sequence: Sequence, sink: Sink, *, lease_id: int, epoch: int) -> Active:
        """Go on where prefill stopped: all tokens but the last are computed. Recomputes when the lease is gone."""
        active = self._watch(Active(sequence, sink, time.monotonic(), joined=True))
        if self._may_begin(active):
            self.leases.join(active, lease_id, epoch)
        return active

    def expect(self, sequence: Sequence, sink: Sink, kvstore: str) -> Active:
        """Take slots and follow the sequence's prefill, on the node of that kvstore, until `begin`."""
        pull = kvstore_pb2.PullBlocks(kvstore=kvstore, follow=True)
        active = self._watch(Active(sequence, sink, time.monotonic(), joined=True, pull=pull, expecting=True))
        if self._may_begin(active):
            self.leases.acquire(active)
        return active

    def begin(self, active: Active, first_token: int) -> None:
        """Prefill is done elsewhere: go on as soon as its blocks are here, and compute what does not come."""
        active.sequence.tokens.append(first_token)
        active.received_s = time.monotonic()
        active.expecting = False
        if active.phase is Phase.READY:
            self._ready(active)
        else:
            self.leases.finish_pull(active)

    def _may_begin(self, active: Active) -> bool:
        if self.slab is None:
            self._fail(active, failure(UNAVAILABLE, "this worker is not attached to its kvstore", retryable=True))
        return self.slab is not None

    def _watch(self, active: Active) -> Active:
        self._actives[active.sequence] = active
        if active.sequence.deadline_s is not None:
            loop = asyncio.get_running_loop()
            active.expiry = loop.call_later(active.sequence.deadline_s, self._expire, active)
        if active.sequence.sampling.constraint is not None:
            self._matchers = self._matchers or Matchers(self._engine.card)
            self._matchers.make(active.sequence, lambda made: self._constrained(active, made))
        return active

    def _constrained(self, active: Active, made: Matcher | common_pb2.Failure) -> None:
        """Its matcher is there, or cannot be."""
        if active.phase is Phase.ENDED:
            return
        if isinstance(made, common_pb2.Failure):
            self._fail(active, made)
        else:
            active.matcher = made
            self._wake.set()
            self.steps.became_ready(active)
            self._invite_guest()

    def _expire(self, active: Active) -> None:
        message = f"the sequence took longer than its deadline of {active.sequence.deadline_s:g} s"
        active.sink.failed(active, failure(grpc.StatusCode.DEADLINE_EXCEEDED, message, retryable=False))
        self.cancel(active)

    def cancel(self, active: Active) -> None:
        """Stop the sequence and free what it holds; nothing is told to its sink."""
        if active.stepping:
            active.interrupt = Interrupt.CANCEL
        elif active.phase is not Phase.ENDED:
            self._end(active)

    @property
    def actives(self) -> list[Active]:
        return list(self._actives.values())

    def expected_by_others(self, router_id: str) -> list[Sequence]:
        """Whose prompts are computed elsewhere on this node, for other routers than that one."""
        return [s for router, sequences in self.expected.items() if router != router_id for s in sequences.values()]

    # ------------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Step while there is work; wait otherwise. Raises HeadwayError when the device does not work any more."""
        while True:
            step = self.steps.next(self._actives) if self.slab is not None else None
            if step is None:
                self.steps.idle()
                self._wake.clear()
                await self._wake.wait()
                continue
            self._between_steps.clear()
            try:
                done = await self._forwards.run(step, self._guest_done if self.steps.hosts else None)
                self.steps.ended()
                self._withdraw_guest()
                self._apply(step, done)
            finally:
                self._between_steps.set()
            if self.slab is not None:
                check_device(done.results)

    def close(self) -> None:
        self._forwards.close()
        if self._matchers:
            self._matchers.close()

    def _invite_guest(self) -> None:
        """Into the forward that runs, one at a time."""
        if self._guest is None and self.slab is not None:
            self._guest = self.steps.guest(self._actives)
            if self._guest is not None:
                self._forwards.invite(self._guest)

    def _guest_done(self, step: Step, done: Done) -> None:
        self._guest = None
        self.steps.guest_took(done.seconds)
        for item in step.work:
            active = self._actives[item.sequence]
            active.started_s = active.started_s or done.started_s
        self._apply(step, done)
        for item in step.work:
            if item.sequence in self._actives:
                self.steps.became_ready(self._actives[item.sequence])
        self._invite_guest()

    def _withdraw_guest(self) -> None:
        """The forward is over, and its guest was too late: it waits for the next plan like all others."""
        self._guest = None
        step = self._forwards.withdraw()
        for item in step.work if step else ():
            active = self._actives[item.sequence]
            _let_go(active)
            if active.interrupt is not None:
                self._interrupted(active)

    def _apply(self, step: Step, done: Done) -> None:
        results: list[Result] = done.results
        if self.slab is None:
            # The store was free to give out anew what was read meanwhile.
            results = [DeviceLost("the kvstore of this node went away")] * len(results)
        self.steps.charge(step.work, done.seconds)
        for item, result in zip(step.work, results, strict=True):
            active, sequence = self._actives[item.sequence], item.sequence
            _let_go(active)
            sequence.computed = item.start + item.count
            if active.interrupt is not None:
                self._interrupted(active)
            elif isinstance(result, DeviceLost):
                self._fail(active, failure(UNAVAILABLE, str(result), retryable=True))
            elif isinstance(result, ConstraintError):
                self._fail(active, failure(INVALID_ARGUMENT, f"constraint: {result}", retryable=False))
            elif isinstance(result, Exception):
                message = f"the engine failed on this sequence: {type(result).__name__}: {result}"
                self._fail(active, failure(grpc.StatusCode.INTERNAL, message, retryable=False))
            elif result is None:
                self.leases.seal(active)
            else:
                self._drawn(active, result)
        self._on_load()

    def _drawn(self, active: Active, drawn: Drawn) -> None:
        sequence = active.sequence
        first = sequence.output_index == 0
        active.first_token_s = active.first_token_s or time.monotonic()
        # Those that follow were drawn after drafts that were right; after a stop token nothing counts.
        for one in (drawn, *drawn.then):
            sequence.computed = len(sequence.tokens)
            output_index = sequence.output_index
            sequence.tokens.append(one.token_id)
            finish = Finish.STOP if one.complete else sequence.finish_after(one.token_id)
            active.sink.drawn(active, one, output_index, finish)
            if finish is not None:
                break
        if finish is not None:
            self.leases.seal(active, last=True)
            self._end(active)
        elif active.joiner:
            self.leases.seal(active, last=True)
            self.leases.hand_off(active)
            self._forget(active)
        else:
            self.leases.seal(active)
            self.leases.grow(active)
        if first:
            self._tell_siblings(sequence)

    def _tell_siblings(self, computed: Sequence) -> None:
        """Those that go on like the prompt that was just computed are shorter now, and may come before others."""
        for active in self._actives.values():
            if active.passed_over and not active.started_s:
                active.sequence.may_have(computed.keys)

    def _interrupted(self, active: Active) -> None:
        interrupt, active.interrupt = active.interrupt, None
        if interrupt is Interrupt.CANCEL:
            self._end(active)
        else:
            self._restart(active)

    def _restart(self, active: Active) -> None:
        """Its slots go back, and what the engine keeps of it."""
        self._engine.forget(active.sequence)
        self.leases.restart(active)

    # ------------------------------------------------------------------ ends

    def _ready(self, active: Active) -> None:
        active.phase = Phase.READY
        if not active.joined:
            # What of it is cached is known now.
            self._on_prompt(active.sink.router_id)
        if not active.expecting:
            active.ready_s = active.ready_s or time.monotonic()
            self._wake.set()
            self.steps.became_ready(active)
            self._invite_guest()

    def _fail(self, active: Active, problem: common_pb2.Failure) -> None:
        active.sink.failed(active, problem)
        self._end(active)

    def _end(self, active: Active) -> None:
        self.leases.release(active)
        self._forget(active)

    def _forget(self, active: Active) -> None:
        active.phase = Phase.ENDED
        if active.expiry is not None:
            active.expiry.cancel()
        self._actives.pop(active.sequence, None)
        self._engine.forget(active.sequence)
        self.leases.forget(active)
        self._on_load()


def _let_go(active: Active) -> None:
    """No forward uses its slots any more: what came for them meanwhile is applied."""
    active.stepping = False
    active.change_slots(active.deferred)
    active.deferred = []
