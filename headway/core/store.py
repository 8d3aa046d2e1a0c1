"""The accounting of a node's KV memory: operations in, results and instructions out; no clock, no network.

Every slot is in exactly one place: free, sealed (cached, and leased while somebody holds it), a lease's own, or
quarantined. `headway.core.audit` recounts all of it.
"""

from __future__ import annotations

from headway.core.blocks import BlockCache
from headway.core.events import BlockEvents
from headway.core.instructions import Filled, Instruction, Offer, Reclaim, Reply, StartPull, StopPull
from headway.core.keys import ROOT
from headway.core.leases import (
    PULL,
    Added,
    Changed,
    Done,
    Granted,
    Lease,
    Problem,
    Refused,
    Result,
    Source,
)
from headway.core.records import Records
from headway.core.slots import SlotPool
from headway.core.waiting import Waiter, WaitQueue

UNKNOWN = Refused(Problem.UNKNOWN, "this lease is unknown here: it ended, or the kvstore restarted; start over")


class Store:
    """Sessions are worker processes (one incarnation each). Times are seconds of one clock, given by the caller.

    Operations return their result, or None when they wait; `instructions()` drains what has to be sent because of
    them.
    """

    def __init__(self, records: Records, block_size: int, handoff_hold_s: float) -> None:
        self.pool = SlotPool(records)
        self.cache = BlockCache(records=records)
        self.events = BlockEvents()
        self.leases: dict[int, Lease] = {}
        self.waiters = WaitQueue()
        # Sessions that only read what they hold: other nodes' kvstores. They can be done without at any time.
        self.readers: set[str] = set()
        # Keys of blocks that a tier below the slab keeps: announced like those in the slab.
        self.below: set[bytes] = set()
        self.hit_tokens = self.missed_tokens = self.evicted_blocks = 0
        self._block = block_size
        self._hold_s = handoff_hold_s
        self._out: list[Instruction] = []
        self._last_lease = 0

    def instructions(self) -> list[Instruction]:
        out, self._out = self._out, []
        return out

    # ------------------------------------------------------------------ acquire, extend

    def acquire(
        self,
        session: str,
        operation_id: int,
        *,
        keys: list[bytes],
        tokens: int,
        growth: int,
        arrival_s: float,
        deadline_s: float,
        joiner: str = "",
        request: tuple[str, int] = ("", 0),
        source: Source | None = None,
    ) -> Result | None:
        """Slots for `tokens` + `growth` tokens, those of the cached prefix among them; all or nothing, oldest first.

        With `source`, the rest is fetched from there into the lease's own slots (see Granted.pulling).
        """
        if tokens < 1:
            return Refused(Problem.INVALID, "a lease is for at least one token; this acquire names none")
        blocks = -(-(tokens + growth) // self._block)
        if blocks > self.pool.total:
            message = (
                f"the request needs {blocks} slots of {self._block} tokens and the slab has {self.pool.total}: "
                "shorten the prompt, or give the kvstore a larger slab (slab_bytes)"
            )
            return Refused(Problem.TOO_LARGE, message)
        self._last_lease += 1
        waiter = Waiter(
            session, operation_id, arrival_s, self._last_lease, deadline_s, keys, tokens, blocks, joiner, None, request,
            source,
        )  # fmt: skip
        return self._enqueue(waiter)

    def extend(
        self, session: str, operation_id: int, lease_id: int, *, blocks: int, deadline_s: float
    ) -> Result | None:
        """More slots for a lease; when it is the youngest and there are none, it must give way itself."""
        lease = self._of(session, lease_id)
        if isinstance(lease, Refused):
            return lease
        if len(lease.slots) + blocks > self.pool.total:
            message = (
                f"the answer outgrew the slab of {self.pool.total} slots: give the kvstore a larger one (slab_bytes)"
            )
            return Refused(Problem.TOO_LARGE, message)
        waiter = Waiter(
            session, operation_id, lease.arrival_s, lease_id, deadline_s, lease.keys, lease.tokens, blocks, "", lease
        )
        return self._enqueue(waiter)

    def cancel_acquire(self, session: str, request: tuple[str, int]) -> None:
        """Refuse the acquires of this request that wait."""
        cancelled = Refused(Problem.CANCELLED, "the worker cancelled this acquire")
        self._out += self.waiters.refuse(
            lambda w: w.lease is None and (w.session, w.request) == (session, request), cancelled
        )
        self._serve()

    def _enqueue(self, waiter: Waiter) -> Result | None:
        oldest = self.waiters.oldest
        if oldest is None or waiter.age < oldest.age:
            result = self._grant(waiter)
            if result is not None:
                return result
        if waiter.lease is not None and self._youngest_is(waiter.lease):
            return Refused(Problem.RECLAIMED, "older requests need the slots; start over")
        self.waiters.add(waiter)
        self._press()
        return None

    def _grant(self, waiter: Waiter) -> Result | None:
        if waiter.lease is not None:
            if waiter.blocks > self.pool.free + self.cache.idle:
                return None
            slots = self._take(waiter.blocks)
            waiter.lease.slots += slots
            return Added(slots)
        found = self.cache.match(waiter.keys, (waiter.tokens - 1) // self._block)
        idle = self.cache.idle - sum(1 for block in found if not block.holds)
        if waiter.blocks - len(found) > self.pool.free + idle:
            return None
        for block in found:
            self.cache.hold(block)
        slots = [block.slot for block in found] + self._take(waiter.blocks - len(found))
        lease = Lease(
            waiter.number,
            waiter.session,
            waiter.joiner,
            waiter.keys,
            waiter.tokens,
            waiter.arrival_s,
            slots,
            found,
            waiter.request,
            source=waiter.source,
        )
        lease.holders.add(waiter.session)
        self.leases[lease.lease_id] = lease
        if lease.source is not None:
            lease.holders.add(PULL)
            self._out.append(StartPull(lease.lease_id))
        self._tell_follower(lease)
        cached = len(found) * self._block
        self.hit_tokens += cached
        self.missed_tokens += waiter.tokens - cached
        return Granted(lease.lease_id, list(slots), cached, pulling=lease.source is not None)

    def _take(self, count: int) -> list[int]:
        """Slots, evicting idle blocks where too few are free; the caller has counted that there are enough."""
        gone: list[bytes] = []
        while self.pool.free < count and (block := self.cache.evict()) is not None:
            self.evicted_blocks += 1
            self.pool.give([block.slot])
            if block.key not in self.below:
                gone.append(block.key)
        if gone:
            self.events.removed(gone)
        return self.pool.take(count)

    def _serve(self) -> None:
        """Grant what waits, oldest first; nobody overtakes."""
        while (waiter := self.waiters.oldest) and (result := self._grant(waiter)) is not None:
            self.waiters.remove(waiter)
            self._out.append(Reply(waiter.session, waiter.operation_id, result))
        self._press()

    def _press(self) -> None:
        """The oldest waiter is short of slots: take them from the youngest lease, one at a time."""
        while (waiter := self.waiters.oldest) and not any(lease.reclaiming for lease in self.leases.values()):
            younger = [lease for lease in self.leases.values() if lease.live and lease.age > waiter.age]
            if not younger:
                return
            victim = max(younger, key=lambda lease: lease.age)
            victim.holders -= self.readers
            if victim.holders:
                victim.reclaiming = True
                self._refuse_extension(victim)
                self._reclaim(victim)
                return
            self._end(victim)
            self._serve()

    def _reclaim(self, lease: Lease) -> None:
        self._out += [Reclaim(session, lease.lease_id) for session in sorted(lease.holders - {PULL})]
        if PULL in lease.holders:
            self._out.append(StopPull(lease.lease_id))

    def _refuse_extension(self, lease: Lease) -> None:
        refused = Refused(Problem.RECLAIMED, "older requests need the slots; start over")
        self._out += self.waiters.refuse(lambda waiter: waiter.lease is lease, refused)

    def _refuse_extension_of(self, session: str, lease: Lease) -> None:
        """The session gives up the lease: it needs no more slots of it."""
        given_up = Refused(Problem.CANCELLED, "the worker gave up the lease before there were slots")
        self._out += self.waiters.refuse(lambda w: w.lease is lease and w.session == session, given_up)

    def _youngest_is(self, lease: Lease) -> bool:
        """Others are live and all of them are older."""
        others = [other for other in self.leases.values() if other is not lease and other.live]
        return bool(others) and all(other.age < lease.age for other in others)

    # ------------------------------------------------------------------ seal, refresh

    def seal(self, session: str, lease_id: int, *, first: int, keys: list[bytes], parent: bytes) -> Result:
        """Blocks [first, first + keys) are written. Where a key is sealed already, the lease switches to that slot."""
        lease = self._of(session, lease_id)
        if isinstance(lease, Refused):
            return lease
        known = lease.blocks[-1].key if lease.blocks else ROOT
        if first != len(lease.blocks) or parent != known or first + len(keys) > len(lease.slots):
            message = f"blocks {first}… of lease {lease_id} cannot be sealed: {len(lease.blocks)} are, in chain order"
            return Refused(Problem.BROKEN_CHAIN, message)
        changes: list[tuple[int, int]] = []
        stored: list[bytes] = []
        for key in keys:
            at = len(lease.blocks)
            block = self.cache.get(key)
            if block is not None:
                self._switch(session, lease, at, block.slot, changes)
                self.cache.hold(block)
            else:
                block = self.cache.add(key, lease.slots[at], lease.blocks[-1] if lease.blocks else None)
                stored.append(key)
            lease.blocks.append(block)
        self._announce(stored)
        self._tell_follower(lease)
        return Changed(changes, len(lease.blocks) * self._block)

    def refresh(self, session: str, lease_id: int, from_token: int) -> Result:
        """Take over blocks that others have sealed since the lease was granted, from the first unsealed one on."""
        lease = self._of(session, lease_id)
        if isinstance(lease, Refused):
            return lease
        changes: list[tuple[int, int]] = []
        shared = bool((lease.holders | lease.suspended) - {session})
        # Another holder would not hear of the change, and the slots that it knows were never written.
        if not shared and from_token // self._block <= len(lease.blocks):
            for key in lease.keys[len(lease.blocks) : (lease.tokens - 1) // self._block]:
                block = self.cache.get(key)
                if block is None:
                    break
                self._switch(session, lease, len(lease.blocks), block.slot, changes)
                self.cache.hold(block)
                lease.blocks.append(block)
        self.hit_tokens += len(changes) * self._block
        self.missed_tokens -= len(changes) * self._block
        return Changed(changes, len(lease.blocks) * self._block)

    def _switch(self, session: str, lease: Lease, at: int, slot: int, changes: list[tuple[int, int]]) -> None:
        """Another holder knows only the former slot (it is written, and equal): it may read it until the lease ends."""
        shared = bool((lease.holders | lease.suspended) - {session})
        lease.losers.setdefault("" if shared else session, []).append(lease.slots[at])
        lease.slots[at] = slot
        changes.append((at, slot))

    # ------------------------------------------------------------------ blocks that come from, or go to, other nodes

    def fill(self, lease_id: int, blocks: int) -> None:
        """The pull has written the next `blocks` full blocks of the lease: they are sealed.

        Where a key is sealed already, the lease switches to that slot; nobody else knows the former one.
        """
        lease = self.leases[lease_id]
        stored: list[bytes] = []
        for key in lease.keys[len(lease.blocks) : len(lease.blocks) + blocks]:
            at, block = len(lease.blocks), self.cache.get(key)
            if block is None:
                block = self.cache.add(key, lease.slots[at], lease.blocks[-1] if lease.blocks else None)
                stored.append(key)
            else:
                self.pool.give([lease.slots[at]])
                lease.slots[at] = block.slot
                self.cache.hold(block)
            lease.blocks.append(block)
        self._announce(stored)
        self._serve()

    def adopt(self, lease_id: int) -> int:
        """Switch to blocks that others have sealed meanwhile, while nothing is being written; sealed blocks so far."""
        lease = self.leases[lease_id]
        there = self.cache.match(lease.keys, len(lease.keys))
        self.fill(lease_id, max(0, min(len(there), lease.tokens // self._block) - len(lease.blocks)))
        return len(lease.blocks)

    def end_pull(self, lease_id: int) -> Lease | None:
        """The pull writes nothing any more; the lease, if others still hold it."""
        lease = self.leases[lease_id]
        lease.source = None
        self.release(PULL, lease_id)
        return self.leases.get(lease_id)

    def pin(self, session: str, keys: list[bytes], arrival_s: float) -> Granted:
        """Hold the leading blocks of a chain that are here for a reader; lease 0 when none is, or can be spared."""
        found = self.cache.match(keys, len(keys))
        if not found:
            return Granted(0, [], 0)
        self._last_lease += 1
        for block in found:
            self.cache.hold(block)
        tokens, slots = len(found) * self._block, [block.slot for block in found]
        lease = Lease(self._last_lease, session, "", keys, tokens, arrival_s, slots, found)
        lease.holders.add(session)
        self.leases[lease.lease_id] = lease
        # Somebody older may be waiting for these very slots.
        self._press()
        return Granted(lease.lease_id, list(slots), tokens) if lease.lease_id in self.leases else Granted(0, [], 0)

    def below_changed(self, stored: list[bytes], removed: list[bytes]) -> None:
        """A tier below the slab keeps these blocks from now on, or no longer."""
        if new := [key for key in stored if key not in self.below and self.cache.get(key) is None]:
            self.events.stored(new)
        self.below.update(stored)
        removed = [key for key in removed if key in self.below]
        self.below.difference_update(removed)
        if gone := [key for key in removed if self.cache.get(key) is None]:
            self.events.removed(gone)

    def _announce(self, sealed: list[bytes]) -> None:
        if new := [key for key in sealed if key not in self.below]:
            self.events.stored(new)

    def _tell_follower(self, lease: Lease) -> None:
        if lease.remote:
            self._out.append(Filled(lease.request, lease.lease_id))

    def _stop_lone_pull(self, lease: Lease) -> None:
        if lease.holders == {PULL}:
            self._out.append(StopPull(lease.lease_id))

    # ------------------------------------------------------------------ join, hand off, release

    def join(self, session: str, worker_id: str, lease_id: int) -> Result:
        """The expected joiner becomes a holder."""
        lease = self.leases.get(lease_id)
        if lease is None or (not lease.live and lease.suspended):
            return UNKNOWN
        if lease.joiner != worker_id:
            return Refused(Problem.NOT_YOURS, f"lease {lease_id} expects {lease.joiner or 'nobody'}, not {worker_id}")
        lease.holders.add(session)
        lease.held_until_s = None
        if lease.reclaiming:
            self._out.append(Reclaim(session, lease_id))
        return Granted(lease_id, list(lease.slots), len(lease.blocks) * self._block)

    def offer(self, session: str, lease_id: int, joiner_session: str | None) -> Result:
        """The joiner holds the lease from now on, beside the session; nothing happens while it is not attached."""
        lease = self._of(session, lease_id)
        if isinstance(lease, Refused):
            return lease
        if joiner_session is not None and not lease.reclaiming and not lease.remote:
            self._pass_to(lease, joiner_session)
        return Done()

    def hand_off(self, session: str, lease_id: int, now_s: float, joiner_session: str | None = None) -> Result:
        """The holder is done; the lease passes to its joiner's session, or waits for one for a bounded time."""
        lease = self._of(session, lease_id)
        if isinstance(lease, Refused):
            return lease
        lease.holders.discard(session)
        self._refuse_extension_of(session, lease)
        if not lease.holders and (lease.reclaiming or not lease.joiner):
            # The joiner will find it gone, and compute the request anew when there is room.
            self._end(lease)
        elif not lease.holders:
            self._pass_on(lease, now_s, joiner_session)
        self._serve()
        return Done()

    def _pass_on(self, lease: Lease, now_s: float, joiner_session: str | None) -> None:
        if joiner_session is None or not self._pass_to(lease, joiner_session):
            lease.held_until_s = now_s + self._hold_s

    def _pass_to(self, lease: Lease, joiner_session: str) -> bool:
        granted = self.join(joiner_session, lease.joiner, lease.lease_id)
        if isinstance(granted, Granted):
            self._out.append(Offer(joiner_session, lease.request, granted))
            return True
        return False

    def release(self, session: str, lease_id: int) -> Result:
        """The session does not use the lease any more. Unknown leases are released already."""
        lease = self.leases.get(lease_id)
        if lease is None:
            return Done()
        held = session in lease.holders
        self._acknowledge(session, lease)
        lease.holders.discard(session)
        self._refuse_extension_of(session, lease)
        if not lease.holders and (held or session == lease.owner):
            self._end(lease)
        elif held:
            self._stop_lone_pull(lease)
        self._serve()
        return Done()

    def _of(self, session: str, lease_id: int) -> Lease | Refused:
        """The lease, if the session holds it; its operation says that it has seen all earlier replies."""
        lease = self.leases.get(lease_id)
        if lease is None:
            return UNKNOWN
        if session not in lease.holders:
            return Refused(Problem.NOT_YOURS, f"lease {lease_id} is not held by this worker")
        self._acknowledge(session, lease)
        return lease

    def _acknowledge(self, session: str, lease: Lease) -> None:
        if losers := lease.losers.pop(session, None):
            self.pool.give(losers)
            self._serve()

    def _end(self, lease: Lease) -> None:
        """Nobody holds it any more: sealed blocks stay as cache, own slots are free.

        If a session is suspended, it may still read the ones and write to the others: all stays as it is.
        """
        lease.held_until_s = None
        lease.reclaiming = False
        if lease.suspended:
            return
        del self.leases[lease.lease_id]
        self.cache.drop(lease.blocks)
        self.pool.give(lease.own)
        for losers in lease.losers.values():
            self.pool.give(losers)

    # ------------------------------------------------------------------ workers that go, time that passes

    def suspend(self, session: str) -> None:
        """The worker's stream broke and it may still use its slots: what only it held is left alone until `resolve`."""
        self._leave(session, suspended=True)

    def resolve(self, session: str) -> None:
        """The worker is dead, or said that it stopped: it holds and writes nothing any more."""
        self._leave(session, suspended=False)
        for lease in [lease for lease in self.leases.values() if session in lease.suspended]:
            lease.suspended.discard(session)
            if losers := lease.losers.pop(session, None):
                self.pool.give(losers)
            if not lease.suspended and not lease.live:
                self._end(lease)
        self._serve()

    def _leave(self, session: str, *, suspended: bool) -> None:
        self.waiters.forget(session)
        for lease in [lease for lease in self.leases.values() if session in lease.holders]:
            lease.holders.discard(session)
            if suspended:
                lease.suspended.add(session)
            elif losers := lease.losers.pop(session, None):
                self.pool.give(losers)
            if not lease.holders:
                self._end(lease)
            else:
                self._stop_lone_pull(lease)
        self._serve()

    def tick(self, now_s: float) -> None:
        """Time passes: waiting ends with a refusal, handoff holds end.

        Reclaims are repeated, because one may have crossed a handoff on its way.
        """
        if self.waiters:
            for lease in self.leases.values():
                if lease.reclaiming:
                    self._reclaim(lease)
        late = Refused(Problem.NO_SLOTS, "the slab had no room in time; try again later, or enlarge slab_bytes")
        self._out += self.waiters.refuse(lambda waiter: waiter.deadline_s <= now_s, late)
        for lease in [lease for lease in self.leases.values() if lease.held_until_s is not None]:
            if lease.held_until_s is not None and lease.held_until_s <= now_s:
                self._end(lease)
        self._serve()

    def quarantine(self, slots: list[int], sessions: set[str]) -> None:
        """Taken slots of nobody's lease that these sessions of a former epoch may still write to."""
        self._last_lease += 1
        lease = Lease(self._last_lease, "", "", [], 0, 0.0, slots, [], suspended=sessions)
        self.leases[lease.lease_id] = lease

    # ------------------------------------------------------------------ figures

    def snapshot(self) -> list[bytes]:
        """The keys of all blocks that are here, those of the slab first, there parents before children."""
        here = [block.key for block in self.cache]
        return here + [key for key in self.below if self.cache.get(key) is None]

    def counts(self) -> dict[str, int]:
        """Slots by state: free + leased + cached + quarantined = all."""
        quarantined = sum(lease.private_slots for lease in self.leases.values() if not lease.live)
        leased = sum(lease.private_slots for lease in self.leases.values() if lease.live)
        held = len(self.cache) - self.cache.idle
        return {
            "free": self.pool.free,
            "leased": leased + held,
            "cached": self.cache.idle,
            "quarantined": quarantined,
        }
