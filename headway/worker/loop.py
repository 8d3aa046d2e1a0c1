"""The engine loop, the same for prefill and decode: plan → forward → apply, over sequences that hold a lease.

Runs on the event loop; only `Engine.forward` runs elsewhere, in one thread. Between `_plan` and `_apply` no block table
in use changes, and no slot in use is given up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from headway.core.sequence import Sequence
from headway.core.step import StepLimits, Work, plan_step
from headway.core.timing import StepTimes
from headway.engine.contract import Chunk, Drawn, Engine
from headway.v1 import common_pb2, kvstore_pb2
from headway.worker import operations
from headway.worker.active import Active, Interrupt, Phase, Sink
from headway.worker.attach import Attachment, OnReply, Slab, failed
from headway.worker.convert import failure

log = logging.getLogger(__name__)

HANDED_OFF_KEPT = 4096
# How long a lease that passed to this worker waits for the router's Begin.
OFFER_S = 10.0
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
Result = Drawn | None | Exception


class EngineLoop:
    """Takes sequences (`start`, `join`, `cancel`), runs them, tells their sinks."""

    def __init__(
        self,
        engine: Engine,
        limits: StepLimits,
        *,
        growth_tokens: int,
        acquire_timeout_s: float,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._growth_tokens = growth_tokens
        self._acquire_timeout_s = acquire_timeout_s
        self._on_load = on_load
        self._block = engine.card.kv_format.block_size
        self._actives: dict[Sequence, Active] = {}
        self._leases: dict[int, Active] = {}
        # Leases given to a joiner: a cancel may still have to release them.
        self._handed_off: OrderedDict[tuple[str, int], int] = OrderedDict()
        # Leases that passed to this worker before the router's Begin came.
        self._offers: dict[tuple[str, int], kvstore_pb2.LeaseGranted] = {}
        self._wake = asyncio.Event()
        self._between_steps = asyncio.Event()
        self._between_steps.set()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._attachment: Attachment | None = None
        self.slab: Slab | None = None
        self.times = StepTimes()
        self.forwards = 0

    # ------------------------------------------------------------------ attachment

    def use(self, attachment: Attachment) -> None:
        """Send lease operations through this attachment."""
        self._attachment = attachment

    def attached(self, slab: Slab) -> None:
        self._engine.bind(slab.view)
        self.slab = slab
        self._on_load()

    async def lost(self) -> None:
        """The kvstore is gone: after the running forward, every sequence fails over; nothing touches the slab after."""
        self.slab = None
        await self._between_steps.wait()
        for active in list(self._actives.values()):
            self._fail(active, failure(UNAVAILABLE, "the kvstore of this node went away", retryable=True))
        self._handed_off.clear()
        self._offers.clear()
        self._engine.unbind()

    def reclaim(self, lease_id: int) -> None:
        """The store wants the slots back: the sequence is preempted and starts over when there is room."""
        active = self._leases.get(lease_id)
        if active is None:
            return
        if active.stepping:
            active.interrupt = active.interrupt or Interrupt.RECLAIM
        else:
            self._restart(active)

    # ------------------------------------------------------------------ commands

    def start(self, sequence: Sequence, sink: Sink, *, joiner: str = "") -> Active:
        """Compute the sequence from what the cache has; with a joiner, only up to its first token."""
        active = self._watch(Active(sequence, sink, time.monotonic(), joiner))
        if self.slab is None:
            self._fail(active, failure(UNAVAILABLE, "this worker is not attached to its kvstore", retryable=True))
        else:
            self._acquire(active)
        return active

    def join(self, sequence: Sequence, sink: Sink, *, lease_id: int, epoch: int) -> Active:
        """Go on where prefill stopped: all tokens but the last are computed. Recomputes when the lease is gone."""
        active = self._watch(Active(sequence, sink, time.monotonic(), joined=True))
        if self.slab is None:
            self._fail(active, failure(UNAVAILABLE, "this worker is not attached to its kvstore", retryable=True))
            return active

        def joined(reply: kvstore_pb2.AttachReply) -> None:
            if failed(reply) is None:
                self._joined(active, reply.granted)
            elif active.phase is not Phase.ENDED:
                sequence.restart()
                self._acquire(active)

        offer = self._offers.pop((sequence.sequence_id, sequence.attempt), None)
        if offer is not None and offer.lease_id == lease_id:
            self._joined(active, offer)
        else:
            self._submit(operations.join(lease_id, epoch), joined)
        return active

    def _watch(self, active: Active) -> Active:
        self._actives[active.sequence] = active
        if active.sequence.deadline_s is not None:
            loop = asyncio.get_running_loop()
            active.expiry = loop.call_later(active.sequence.deadline_s, self._expire, active)
        return active

    def _expire(self, active: Active) -> None:
        message = f"the sequence took longer than its deadline of {active.sequence.deadline_s:g} s"
        active.sink.failed(active, failure(grpc.StatusCode.DEADLINE_EXCEEDED, message, retryable=False))
        self.cancel(active)

    def offer(self, granted: kvstore_pb2.LeaseGranted) -> None:
        """A lease passed to this worker; the router's Begin, or a cancel, follows, or came already."""
        key = (granted.sequence_id, granted.attempt)
        if granted.lease_id in self._leases:
            return
        self._offers[key] = granted
        asyncio.get_running_loop().call_later(OFFER_S, self._decline, key, granted.lease_id)

    def _decline(self, key: tuple[str, int], lease_id: int) -> None:
        offer = self._offers.get(key)
        if offer is not None and offer.lease_id == lease_id:
            del self._offers[key]
            self._submit(operations.release(lease_id))

    def cancel(self, active: Active) -> None:
        """Stop the sequence and free what it holds; nothing is told to its sink."""
        if active.stepping:
            active.interrupt = Interrupt.CANCEL
        elif active.phase is not Phase.ENDED:
            self._end(active)

    def release_handed_off(self, sequence_id: str, attempt: int) -> None:
        """The request ended between first token and join: end the hold on its lease, at either end of the handoff."""
        key = (sequence_id, attempt)
        lease_id = self._handed_off.pop(key, None)
        if lease_id is not None:
            self._submit(operations.release(lease_id))
        if key in self._offers:
            self._decline(key, self._offers[key].lease_id)

    # ------------------------------------------------------------------ load

    @property
    def actives(self) -> list[Active]:
        return list(self._actives.values())

    # ------------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Step while there is work; wait otherwise."""
        loop = asyncio.get_running_loop()
        while True:
            work = self._plan() if self.slab is not None else []
            if not work:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._between_steps.clear()
            try:
                results = await loop.run_in_executor(self._thread, self._forward, self._chunks(work), work)
                self._apply(work, results)
            finally:
                self._between_steps.set()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _plan(self) -> list[Work]:
        ready = [active.sequence for active in self._actives.values() if active.runnable]
        work = plan_step(ready, self._limits, self.times.predictor)
        kept: list[Work] = []
        for item in work:
            active = self._actives[item.sequence]
            if active.passed_over and not active.replies_due and not item.sequence.decoding:
                self._refresh(active)
            else:
                kept.append(item)
        if len(ready) > len(work):
            picked = {item.sequence for item in work}
            for sequence in ready:
                if sequence not in picked:
                    self._actives[sequence].passed_over = True
        return kept

    def _chunks(self, work: list[Work]) -> list[Chunk]:
        now = time.monotonic()
        chunks = []
        for item in work:
            active = self._actives[item.sequence]
            active.stepping = True
            active.started_s = active.started_s or now
            tokens = item.sequence.tokens[item.start : item.start + item.count]
            chunks.append(Chunk(tokens, item.start, active.slots, active.draw() if item.draws else None))
        return chunks

    def _forward(self, chunks: list[Chunk], work: list[Work]) -> list[Result]:
        """In the engine's thread. When the batch fails, each chunk runs alone, so that only the culprit fails."""
        started = time.monotonic()
        try:
            results: list[Result] = list(self._engine.forward(chunks))
        except Exception:
            log.exception("event=forward_failed sequences=%d", len(chunks))
            return [self._forward_alone(chunk) for chunk in chunks]
        prompts = sum(item.count for item in work if not item.sequence.decoding)
        decoding = sum(1 for item in work if item.sequence.decoding)
        self.times.observe(prompts, decoding, time.monotonic() - started)
        self.forwards += 1
        return results

    def _forward_alone(self, chunk: Chunk) -> Result:
        try:
            return self._engine.forward([chunk])[0]
        except Exception as error:
            return error

    def _apply(self, work: list[Work], results: list[Result]) -> None:
        for item, result in zip(work, results, strict=True):
            active, sequence = self._actives[item.sequence], item.sequence
            active.stepping = False
            active.change_slots(active.deferred)
            active.deferred = []
            sequence.computed = item.start + item.count
            if active.interrupt is not None:
                self._interrupted(active)
            elif isinstance(result, Exception):
                message = f"the engine failed on this sequence: {type(result).__name__}: {result}"
                self._fail(active, failure(grpc.StatusCode.INTERNAL, message, retryable=False))
            elif result is None:
                self._seal(active)
            else:
                self._drawn(active, result)
        self._on_load()

    def _drawn(self, active: Active, drawn: Drawn) -> None:
        sequence = active.sequence
        output_index = sequence.output_index
        sequence.tokens.append(drawn.token_id)
        active.first_token_s = active.first_token_s or time.monotonic()
        finish = sequence.finish_after(drawn.token_id)
        active.sink.drawn(active, drawn, output_index, finish)
        if finish is not None:
            self._seal(active, last=True)
            self._end(active)
        elif active.joiner:
            self._seal(active, last=True)
            self._hand_off(active)
        else:
            self._seal(active)
            self._grow(active)

    def _interrupted(self, active: Active) -> None:
        interrupt, active.interrupt = active.interrupt, None
        if interrupt is Interrupt.CANCEL:
            self._end(active)
        else:
            self._restart(active)

    # ------------------------------------------------------------------ leases

    def _submit(self, operation: kvstore_pb2.AttachOperation, on_reply: OnReply | None = None) -> None:
        if self._attachment is not None:
            self._attachment.submit(operation, on_reply)

    def _acquire(self, active: Active) -> None:
        active.phase = Phase.ACQUIRING

        def acquired(reply: kvstore_pb2.AttachReply) -> None:
            problem = failed(reply)
            if problem is None:
                active.sequence.computed = reply.granted.cached_tokens
                active.sequence.sealed = active.sequence.computed // self._block
                active.sequence.cached_tokens = active.sequence.computed
                self._granted(active, reply.granted)
            elif active.phase is not Phase.ENDED:
                self._fail(active, problem)

        operation = operations.acquire(active.sequence, active.joiner, self._growth_tokens, self._acquire_timeout_s)
        self._submit(operation, acquired)

    def _joined(self, active: Active, granted: kvstore_pb2.LeaseGranted) -> None:
        sequence = active.sequence
        sequence.computed = len(sequence.tokens) - 1
        sequence.given = sequence.computed
        sequence.sealed = sequence.computed // self._block
        self._offers.pop((sequence.sequence_id, sequence.attempt), None)
        self._granted(active, granted)

    def _granted(self, active: Active, granted: kvstore_pb2.LeaseGranted) -> None:
        if active.phase is Phase.ENDED:
            self._submit(operations.release(granted.lease_id))
            return
        active.lease_id = granted.lease_id
        active.slots = np.array(granted.slots, np.int32)
        self._leases[active.lease_id] = active
        self._ready(active)

    def _ready(self, active: Active) -> None:
        active.phase = Phase.READY
        active.ready_s = active.ready_s or time.monotonic()
        self._wake.set()

    def _refresh(self, active: Active) -> None:
        """Ask again what is cached: while this prompt waited, a sibling may have sealed its prefix."""
        active.passed_over = False
        active.phase = Phase.REFRESHING
        sequence = active.sequence
        from_token = sequence.computed // self._block * self._block

        def refreshed(reply: kvstore_pb2.AttachReply) -> None:
            if active.phase is not Phase.REFRESHING:
                return
            if failed(reply) is None:
                active.change_slots(list(reply.refreshed.changes))
                gained = max(0, reply.refreshed.cached_tokens - sequence.computed)
                sequence.computed += gained
                sequence.cached_tokens += gained
                sequence.sealed = max(sequence.sealed, sequence.computed // self._block) if gained else sequence.sealed
            self._ready(active)

        self._submit(operations.refresh(active.lease_id, from_token), refreshed)

    def _seal(self, active: Active, *, last: bool = False) -> None:
        """Seal what is full, unless an earlier reply about this lease is due (the next step seals it then).

        `last`: the table is not used here again, so nothing has to be waited for.
        """
        if active.replies_due and not last:
            return
        first, keys, parent = active.sequence.sealable()
        if not keys:
            return
        active.sequence.sealed = first + len(keys)
        operation = operations.seal(active.lease_id, first, keys, parent)
        self._submit(operation, None if last else self._sealed_reply(active))

    def _sealed_reply(self, active: Active) -> OnReply:
        active.replies_due += 1
        lease_id = active.lease_id

        def sealed(reply: kvstore_pb2.AttachReply) -> None:
            if active.lease_id != lease_id:
                return
            active.replies_due -= 1
            if failed(reply) is None:
                active.change_slots(list(reply.sealed.changes))
            else:
                log.warning("event=seal_refused reason=%s", reply.failure.message)
            if active.phase is Phase.READY and not active.stepping:
                # It may be out of slots, and had to wait for this reply to ask for more.
                self._grow(active)

        return sealed

    def _grow(self, active: Active) -> None:
        """Ask for more slots half a block before they are needed, so that no step waits for the reply."""
        if active.replies_due or active.capacity - len(active.sequence.tokens) > self._block // 2:
            return
        sequence = active.sequence
        left = min(sequence.max_tokens - sequence.output_index, sequence.context_tokens - len(sequence.tokens))
        missing = len(sequence.tokens) + min(left, self._growth_tokens) - active.capacity
        if missing <= 0:
            return
        active.replies_due += 1
        lease_id = active.lease_id

        def extended(reply: kvstore_pb2.AttachReply) -> None:
            if active.lease_id != lease_id:
                return
            active.replies_due -= 1
            if active.phase is Phase.ENDED:
                return
            if failed(reply) is None:
                active.slots = np.concatenate([active.slots, np.array(reply.extended.slots, np.int32)])
                self._wake.set()
            else:
                self.reclaim(lease_id)

        blocks = -(-missing // self._block)
        self._submit(operations.extend(lease_id, blocks, self._acquire_timeout_s), extended)

    def _hand_off(self, active: Active) -> None:
        self._submit(operations.hand_off(active.lease_id))
        self._handed_off[active.sequence.sequence_id, active.sequence.attempt] = active.lease_id
        if len(self._handed_off) > HANDED_OFF_KEPT:
            self._handed_off.popitem(last=False)
        self._forget(active)

    def _restart(self, active: Active) -> None:
        """Preempt by recompute: give up the lease and queue again with the same age."""
        log.info("event=preempted sequence=%s", active.sequence.sequence_id)
        self._leases.pop(active.lease_id, None)
        self._submit(operations.release(active.lease_id))
        active.lease_id = 0
        active.replies_due = 0
        active.sequence.restart()
        self._acquire(active)

    # ------------------------------------------------------------------ ends

    def _fail(self, active: Active, problem: common_pb2.Failure) -> None:
        active.sink.failed(active, problem)
        self._end(active)

    def _end(self, active: Active) -> None:
        if active.phase is Phase.ACQUIRING:
            self._submit(operations.cancel_acquire(active.sequence))
        if active.lease_id:
            self._submit(operations.release(active.lease_id))
        self._forget(active)

    def _forget(self, active: Active) -> None:
        active.phase = Phase.ENDED
        if active.expiry is not None:
            active.expiry.cancel()
        self._actives.pop(active.sequence, None)
        self._leases.pop(active.lease_id, None)
        self._on_load()
