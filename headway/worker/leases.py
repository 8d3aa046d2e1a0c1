"""The leases of a worker's sequences: asked for, refreshed, sealed, extended, handed over, given back.

Rule: an operation on a lease tells the store that all earlier replies about it were applied. So while a reply is due
nothing else is sent, and slot changes are applied only between forwards (`Active.change_slots`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from headway.core.timings import Timings
from headway.v1 import common_pb2, kvstore_pb2
from headway.worker import operations
from headway.worker.active import Active, Phase
from headway.worker.attach import Attachment, OnReply, failed

log = logging.getLogger(__name__)

HANDED_OFF_KEPT = 4096
CANCELLED_KEPT = 4096
# How long a lease that passed to this worker waits for the router's Begin.
OFFER_S = 10.0


class Leases:
    """on_ready(active): it holds slots and may run. on_refused(active, failure): it never will.

    on_preempt(active): it must give its slots back and start over (`restart`) as soon as no forward uses them.
    """

    def __init__(
        self,
        block_size: int,
        growth_tokens: int,
        acquire_timeout_s: float,
        timings: Timings,
        *,
        on_ready: Callable[[Active], None],
        on_refused: Callable[[Active, common_pb2.Failure], None],
        on_preempt: Callable[[Active], None],
    ) -> None:
        self._block = block_size
        self._growth_tokens = growth_tokens
        self._timeout_s = acquire_timeout_s
        self._timings = timings
        self._on_ready, self._on_refused, self._on_preempt = on_ready, on_refused, on_preempt
        self._held: dict[int, Active] = {}
        # Leases given to a joiner: a cancel may still have to release them.
        self._handed_off: OrderedDict[tuple[str, int], int] = OrderedDict()
        # Sequences that were cancelled: a lease of theirs may still be on its way here.
        self._cancelled: OrderedDict[tuple[str, int], None] = OrderedDict()
        # Leases that passed to this worker before the router's Begin came.
        self._offers: dict[tuple[str, int], kvstore_pb2.LeaseGranted] = {}
        self._attachment: Attachment | None = None

    def use(self, attachment: Attachment) -> None:
        """Send operations through this attachment."""
        self._attachment = attachment

    def clear(self) -> None:
        """The store is gone, and all leases with it."""
        self._held.clear()
        self._handed_off.clear()
        self._offers.clear()

    # ------------------------------------------------------------------ getting

    def acquire(self, active: Active) -> None:
        """Ask for slots; what the cache has of the prompt comes along."""
        active.phase = Phase.ACQUIRING

        def acquired(reply: kvstore_pb2.AttachReply) -> None:
            problem = failed(reply)
            if problem is None:
                self._found(active, reply.granted.cached_tokens)
                self._granted(active, reply.granted)
            elif active.phase is not Phase.ENDED:
                self._on_refused(active, problem)

        self._submit(
            operations.acquire(
                active.sequence,
                active.joiner,
                self._growth_tokens,
                self._timeout_s,
                active.pull,
                self._timings.now.prefill_token_s,
            ),
            acquired,
        )

    def pulled(self, pulled: kvstore_pb2.LeasePulled) -> None:
        """The kvstore has fetched what it could: from now on the slots are this worker's to write."""
        active = self._held.get(pulled.lease_id)
        if active is not None:
            active.slots = np.array(pulled.slots, np.int32)
            active.pulled_bytes += pulled.bytes
            self._found(active, pulled.cached_tokens)
            self._on_ready(active)

    def finish_pull(self, active: Active) -> None:
        """The prefill elsewhere is done."""
        if active.lease_id and active.phase is Phase.ACQUIRING:
            self._submit(operations.finish_pull(active.lease_id))

    def _found(self, active: Active, tokens: int) -> None:
        """So many leading tokens need not be computed here."""
        sequence = active.sequence
        sequence.computed = sequence.cached_tokens = tokens
        sequence.sealed = tokens // self._block

    def join(self, active: Active, lease_id: int, epoch: int) -> None:
        """Take the lease over from prefill: usually it was pushed here before the router's Begin came."""

        def joined(reply: kvstore_pb2.AttachReply) -> None:
            if failed(reply) is None:
                self._joined(active, reply.granted)
            elif active.phase is not Phase.ENDED:
                active.sequence.restart()
                self.acquire(active)

        offer = self._offers.pop(_key(active), None)
        if offer is not None and offer.lease_id == lease_id:
            self._joined(active, offer)
        else:
            self._submit(operations.join(lease_id, epoch), joined)

    def offer(self, granted: kvstore_pb2.LeaseGranted) -> None:
        """A lease passed to this worker; the router's Begin, or a cancel, follows, or came already."""
        key = (granted.sequence_id, granted.attempt)
        if granted.lease_id in self._held:
            return
        if key in self._cancelled:
            self._submit(operations.release(granted.lease_id))
            return
        self._offers[key] = granted
        asyncio.get_running_loop().call_later(OFFER_S, self._decline, key, granted.lease_id)

    def refresh(self, active: Active) -> None:
        """Ask again what is cached: while this prompt waited, a sibling may have sealed its prefix."""
        active.passed_over = False
        active.sequence.likely = 0
        active.phase = Phase.REFRESHING
        sequence, lease_id = active.sequence, active.lease_id
        from_token = sequence.computed // self._block * self._block

        def refreshed(reply: kvstore_pb2.AttachReply) -> None:
            if active.phase is not Phase.REFRESHING or active.lease_id != lease_id:
                return
            if failed(reply) is None:
                active.change_slots(list(reply.refreshed.changes))
                gained = reply.refreshed.cached_tokens - sequence.computed
                if gained > 0:
                    sequence.computed += gained
                    sequence.cached_tokens += gained
                    sequence.sealed = sequence.computed // self._block
            self._on_ready(active)

        self._submit(operations.refresh(lease_id, from_token), refreshed)

    def _joined(self, active: Active, granted: kvstore_pb2.LeaseGranted) -> None:
        sequence = active.sequence
        sequence.computed = sequence.given = len(sequence.tokens) - 1
        sequence.sealed = sequence.computed // self._block
        self._offers.pop(_key(active), None)
        self._granted(active, granted)

    def _granted(self, active: Active, granted: kvstore_pb2.LeaseGranted) -> None:
        if active.phase is Phase.ENDED:
            self._submit(operations.release(granted.lease_id))
            return
        active.lease_id = granted.lease_id
        active.slots = np.array(granted.slots, np.int32)
        self._held[active.lease_id] = active
        if not granted.pulling:
            self._on_ready(active)
        elif active.pull is not None and active.pull.follow and not active.expecting:
            self.finish_pull(active)

    # ------------------------------------------------------------------ using

    def seal(self, active: Active, *, last: bool = False) -> None:
        """Seal what is full, unless an earlier reply about this lease is due (the next step seals it then).

        `last`: the table is not used here again, so nothing has to be waited for.
        """
        if active.replies_due and not last:
            return
        first, keys, parent = active.sequence.sealable()
        if not keys:
            return
        active.sequence.sealed = first + len(keys)

        def sealed(reply: kvstore_pb2.AttachReply) -> None:
            if failed(reply) is None:
                active.change_slots(list(reply.sealed.changes))
            else:
                log.warning("event=seal_refused reason=%s", reply.failure.message)
            if active.phase is Phase.READY and not active.stepping:
                # It may be out of slots, and had to wait for this reply to ask for more.
                self.grow(active)

        operation = operations.seal(active.lease_id, first, keys, parent)
        self._submit(operation, None if last else self._due(active, sealed))

    def grow(self, active: Active) -> None:
        """Ask for more slots half a block before they are needed, so that no step waits for the reply."""
        sequence = active.sequence
        if active.replies_due or active.capacity - len(sequence.tokens) > self._block // 2:
            return
        left = min(sequence.max_tokens - sequence.output_index, sequence.context_tokens - len(sequence.tokens))
        missing = len(sequence.tokens) + min(left, self._growth_tokens) - active.capacity
        if missing <= 0:
            return

        def extended(reply: kvstore_pb2.AttachReply) -> None:
            if failed(reply) is None:
                active.slots = np.concatenate([active.slots, np.array(reply.extended.slots, np.int32)])
                self._on_ready(active)
            else:
                self._on_preempt(active)

        blocks = -(-missing // self._block)
        operation = operations.extend(active.lease_id, blocks, self._timeout_s)
        self._submit(operation, self._due(active, extended))

    def reclaim(self, lease_id: int) -> None:
        """The store asks for the slots back; it may ask more than once."""
        active = self._held.get(lease_id)
        if active is not None:
            self._on_preempt(active)
            return
        for key, offer in list(self._offers.items()):
            if offer.lease_id == lease_id:
                self._decline(key, lease_id)

    def _due(self, active: Active, on_reply: OnReply) -> OnReply:
        """Count the reply as due; it is ignored once the sequence has ended or holds another lease."""
        active.replies_due += 1
        lease_id = active.lease_id

        def replied(reply: kvstore_pb2.AttachReply) -> None:
            if active.lease_id == lease_id and active.phase is not Phase.ENDED:
                active.replies_due -= 1
                on_reply(reply)

        return replied

    # ------------------------------------------------------------------ giving back

    def offer_to_joiner(self, active: Active) -> None:
        """The last chunk is about to be computed: meanwhile the joiner can get the block table."""
        if not active.replies_due:
            self._submit(operations.offer(active.lease_id))

    def hand_off(self, active: Active) -> None:
        """The joiner goes on with the lease."""
        self._submit(operations.hand_off(active.lease_id))
        self._handed_off[_key(active)] = active.lease_id
        if len(self._handed_off) > HANDED_OFF_KEPT:
            self._handed_off.popitem(last=False)

    def restart(self, active: Active) -> None:
        """Preempt by recompute: give up the lease and queue again with the same age."""
        log.info("event=preempted sequence=%s", active.sequence.sequence_id)
        self._held.pop(active.lease_id, None)
        self._submit(operations.release(active.lease_id))
        active.lease_id = active.replies_due = 0
        active.sequence.restart()
        if active.pull is not None and active.pull.follow and not active.expecting:
            # There is nothing to follow any more.
            active.pull = None
        self.acquire(active)

    def release(self, active: Active) -> None:
        """The sequence is over."""
        if active.phase is Phase.ACQUIRING:
            self._submit(operations.cancel_acquire(active.sequence))
        if active.lease_id:
            self._submit(operations.release(active.lease_id))

    def forget(self, active: Active) -> None:
        self._held.pop(active.lease_id, None)

    def release_handed_off(self, sequence_id: str, attempt: int) -> None:
        """The request ended between first token and join: end the hold on its lease, at either end of the handoff."""
        key = (sequence_id, attempt)
        self._cancelled[key] = None
        if len(self._cancelled) > CANCELLED_KEPT:
            self._cancelled.popitem(last=False)
        lease_id = self._handed_off.pop(key, None)
        if lease_id is not None:
            self._submit(operations.release(lease_id))
        if key in self._offers:
            self._decline(key, self._offers[key].lease_id)

    def _decline(self, key: tuple[str, int], lease_id: int) -> None:
        offer = self._offers.get(key)
        if offer is not None and offer.lease_id == lease_id:
            del self._offers[key]
            self._submit(operations.release(lease_id))

    def _submit(self, operation: kvstore_pb2.AttachOperation, on_reply: OnReply | None = None) -> None:
        if self._attachment is not None:
            self._attachment.submit(operation, on_reply)


def _key(active: Active) -> tuple[str, int]:
    return (active.sequence.sequence_id, active.sequence.attempt)
