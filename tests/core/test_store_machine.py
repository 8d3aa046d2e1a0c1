"""Any interleaving of operations keeps the accounting whole, and nobody's slots are given to anybody else."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headway.core.audit import check_integrity
from headway.core.instructions import Offer, Reclaim, Reply, StartPull, StopPull
from headway.core.keys import block_keys
from headway.core.leases import PULL, Added, Changed, Granted, Result, Source
from headway.core.records import ForgetfulRecords
from headway.core.restore import restore
from headway.core.store import Store

BLOCK = 4
SLOTS = 12
SESSIONS = ("p", "q", "d")
# Another node's kvstore, which reads here.
READER = "@node/1"
# Few distinct contents, so that prefixes and duplicates are common.
PROMPTS = [[seed] * length for seed in (1, 2) for length in (3, 9, 17, 26)] + [[1] * 8 + [2] * 9]


@dataclass
class Held:
    """A lease as its worker knows it: table, and what it may still write (unsealed, or lost and not acknowledged)."""

    session: str
    lease_id: int
    prompt: list[int]
    slots: list[int]
    sealed: int
    losers: list[int] = field(default_factory=list)

    def writable(self) -> set[int]:
        return {*self.slots[self.sealed :], *self.losers}


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # They outlive the store.
        self.records = ForgetfulRecords(SLOTS)
        self.store = Store(self.records, BLOCK, handoff_hold_s=5.0)
        self.store.readers.add(READER)
        # Prompts of leases that blocks are being fetched for: until that ends, nobody else touches their slots.
        self.pulling: dict[int, list[int]] = {}
        # What the other node reads: leases, while they are not taken from it.
        self.read: set[int] = set()
        self.now = 0.0
        self.last = 0
        self.held: dict[tuple[str, int], Held] = {}
        # What sessions whose stream broke may still be writing.
        self.ghosts: dict[str, set[int]] = {}
        # Tables that the joiner got while the owner went on; it hears of no change to them.
        self.joined: dict[int, set[int]] = {}
        self.asked: dict[int, tuple[str, list[int]]] = {}
        self.extending: dict[int, tuple[str, int]] = {}
        self.known: set[bytes] = set()
        self.seen = 0

    # ------------------------------------------------------------------ what the store says

    def take(self, session: str, operation_id: int, result: Result | None) -> None:
        if isinstance(result, Granted):
            prompt = self.asked.pop(operation_id)[1]
            held = Held(session, result.lease_id, prompt, list(result.slots), result.cached_tokens // BLOCK)
            self.held[session, result.lease_id] = held
            if self.store.leases[result.lease_id].source is not None:
                self.pulling[result.lease_id] = prompt
        elif isinstance(result, Added):
            key = self.extending.pop(operation_id)
            self.held[key].slots += result.slots
        elif result is not None:
            self.asked.pop(operation_id, None)
            self.extending.pop(operation_id, None)

    def listen(self) -> None:
        """Obey what the store sends: replies, reclaims, leases passed by handoff."""
        while instructions := self.store.instructions():
            for item in instructions:
                if isinstance(item, StartPull):
                    self.pulling.setdefault(item.lease_id, [])
                elif isinstance(item, StopPull):
                    assert item.lease_id in self.pulling
                elif isinstance(item, Offer) and item.session == READER:
                    self.read.add(item.granted.lease_id)
                elif isinstance(item, Reply):
                    self.take(item.session, item.operation_id, item.result)
                elif isinstance(item, Offer):
                    prompt = PROMPTS[item.request[1]]
                    sealed = item.granted.cached_tokens // BLOCK
                    if any(lease_id == item.granted.lease_id for _, lease_id in self.held):
                        self.joined[item.granted.lease_id] = set(item.granted.slots)
                        continue
                    held = Held(item.session, item.granted.lease_id, prompt, list(item.granted.slots), sealed)
                    self.held[item.session, item.granted.lease_id] = held
                elif isinstance(item, Reclaim) and (item.session, item.lease_id) in self.held:
                    self.drop(item.session, item.lease_id)
                elif isinstance(item, Reclaim) and item.session == "d" and item.lease_id in self.joined:
                    self.leave(item.lease_id)

    def drop(self, session: str, lease_id: int) -> None:
        del self.held[session, lease_id]
        self.extending = {op: key for op, key in self.extending.items() if key != (session, lease_id)}
        self.store.release(session, lease_id)

    def leave(self, lease_id: int) -> None:
        del self.joined[lease_id]
        self.store.release("d", lease_id)

    @property
    def usable(self) -> dict[tuple[str, int], Held]:
        """Leases that their workers may use."""
        return {key: held for key, held in self.held.items() if held.lease_id not in self.pulling}

    def pick(self, data: st.DataObject) -> Held:
        return self.held[data.draw(st.sampled_from(sorted(self.usable)))]

    # ------------------------------------------------------------------ what workers do

    @rule(
        session=st.sampled_from(SESSIONS),
        prompt=st.integers(0, len(PROMPTS) - 1),
        growth=st.integers(0, 9),
        pull=st.booleans(),
        remote=st.booleans(),
    )
    def acquire(self, session: str, prompt: int, growth: int, pull: bool, remote: bool) -> None:
        if session in self.ghosts:
            return
        self.last += 1
        tokens = PROMPTS[prompt]
        self.asked[self.last] = (session, tokens)
        result = self.store.acquire(
            session,
            self.last,
            keys=block_keys(b"n", tokens, BLOCK),
            tokens=len(tokens),
            growth=growth,
            arrival_s=float(self.last % 7),
            deadline_s=self.now + 20,
            joiner="@node" if remote else "decode",
            request=("r", prompt),
            source=Source("elsewhere") if pull else None,
        )
        self.take(session, self.last, result)
        self.listen()

    @rule(data=st.data(), keep=st.booleans(), here=st.booleans())
    def tier(self, data: st.DataObject, keep: bool, here: bool) -> None:
        """A tier below the slab has taken blocks, whether they are still in the slab or not; or gave some up."""
        cached = sorted(block.key for block in self.store.cache)
        anything = sorted({key for prompt in PROMPTS for key in block_keys(b"n", prompt, BLOCK)})
        keys = data.draw(st.lists(st.sampled_from(cached if here and cached else anything), unique=True, max_size=5))
        self.store.below_changed(keys if keep else [], [] if keep else keys)

    @precondition(lambda self: self.usable)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        held = self.pick(data)
        keys = block_keys(b"n", held.prompt, BLOCK)
        if held.sealed >= len(keys):
            return
        count = data.draw(st.integers(1, len(keys) - held.sealed))
        parent = keys[held.sealed - 1] if held.sealed else b""
        held.losers = []
        result = self.store.seal(
            held.session, held.lease_id, first=held.sealed, keys=keys[held.sealed : held.sealed + count], parent=parent
        )
        assert isinstance(result, Changed)
        self.change(held, result)
        assert held.sealed == result.cached_tokens // BLOCK
        self.listen()

    @precondition(lambda self: self.usable)
    @rule(data=st.data())
    def refresh(self, data: st.DataObject) -> None:
        held = self.pick(data)
        held.losers = []
        result = self.store.refresh(held.session, held.lease_id, held.sealed * BLOCK)
        if isinstance(result, Changed):
            self.change(held, result)
        self.listen()

    def change(self, held: Held, changed: Changed) -> None:
        for block, slot in changed.changes:
            held.losers.append(held.slots[block])
            held.slots[block] = slot
        held.sealed = changed.cached_tokens // BLOCK

    @precondition(lambda self: self.usable)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        held = self.pick(data)
        if (held.session, held.lease_id) in self.extending.values():
            return
        self.last += 1
        held.losers = []
        self.extending[self.last] = (held.session, held.lease_id)
        result = self.store.extend(held.session, self.last, held.lease_id, blocks=1, deadline_s=self.now + 20)
        self.take(held.session, self.last, result)
        self.listen()

    @precondition(lambda self: self.usable)
    @rule(data=st.data(), attached=st.booleans())
    def hand_off(self, data: st.DataObject, attached: bool) -> None:
        held = self.pick(data)
        if held.session == "d":
            return
        self.extending = {op: key for op, key in self.extending.items() if key != (held.session, held.lease_id)}
        del self.held[held.session, held.lease_id]
        joiner = "d" if attached and "d" not in self.ghosts else None
        if self.store.leases[held.lease_id].remote:
            joiner = READER if attached else None
        self.store.hand_off(held.session, held.lease_id, self.now, joiner)
        self.listen()

    @precondition(lambda self: self.usable and "d" not in self.ghosts)
    @rule(data=st.data(), offered=st.booleans())
    def join_early(self, data: st.DataObject, offered: bool) -> None:
        held = self.pick(data)
        if held.session == "d" or held.lease_id in self.joined or self.store.leases[held.lease_id].remote:
            return
        if offered:
            held.losers = []
            self.store.offer(held.session, held.lease_id, "d")
            self.listen()
            return
        result = self.store.join("d", "decode", held.lease_id)
        assert isinstance(result, Granted)
        self.joined[held.lease_id] = set(result.slots)
        self.listen()

    @precondition(lambda self: self.joined)
    @rule(data=st.data())
    def leave_early(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(sorted(self.joined))))
        self.listen()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        self.drop(held.session, held.lease_id)
        self.listen()

    @precondition(lambda self: self.pulling)
    @rule(data=st.data(), blocks=st.integers(0, 3), adopt=st.booleans())
    def fill(self, data: st.DataObject, blocks: int, adopt: bool) -> None:
        """Blocks have come from elsewhere; or others have sealed them here."""
        lease_id = data.draw(st.sampled_from(sorted(self.pulling)))
        lease = self.store.leases[lease_id]
        if adopt:
            self.store.adopt(lease_id)
        else:
            self.store.fill(lease_id, min(blocks, lease.tokens // BLOCK - len(lease.blocks)))
        self.listen()

    @precondition(lambda self: self.pulling)
    @rule(data=st.data())
    def end_pull(self, data: st.DataObject) -> None:
        self.finish_pull(data.draw(st.sampled_from(sorted(self.pulling))))

    def finish_pull(self, lease_id: int) -> None:
        """Well, or because nobody wants it any more: the worker gets the table as it is."""
        del self.pulling[lease_id]
        lease = self.store.end_pull(lease_id)
        for held in self.held.values():
            if held.lease_id == lease_id:
                assert lease is not None
                held.slots, held.sealed = list(lease.slots), len(lease.blocks)
        self.listen()

    @rule(prompt=st.integers(0, len(PROMPTS) - 1))
    def pin(self, prompt: int) -> None:
        """Another node wants to read what is here of a prompt."""
        found = self.store.pin(READER, block_keys(b"n", PROMPTS[prompt], BLOCK), float(self.last % 7))
        if found.lease_id:
            self.read.add(found.lease_id)
        self.listen()

    @precondition(lambda self: self.read)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.read)))
        self.read.remove(lease_id)
        self.store.release(READER, lease_id)
        self.listen()

    @rule()
    def reader_goes(self) -> None:
        self.read.clear()
        self.store.resolve(READER)
        self.listen()

    @rule(session=st.sampled_from(SESSIONS))
    def suspend(self, session: str) -> None:
        if session in self.ghosts:
            return
        mine = [held for held in self.usable.values() if held.session == session]
        self.ghosts[session] = set().union(*(held.writable() for held in mine))
        self.held = {key: held for key, held in self.held.items() if held.session != session}
        self.asked = {op: asked for op, asked in self.asked.items() if asked[0] != session}
        self.extending = {op: key for op, key in self.extending.items() if key[0] != session}
        if session == "d":
            self.joined.clear()
        self.store.suspend(session)
        self.listen()

    @precondition(lambda self: self.ghosts)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.ghosts)))
        del self.ghosts[session]
        self.store.resolve(session)
        self.listen()

    @rule(dead=st.sets(st.sampled_from(SESSIONS)))
    def crash(self, dead: set[str]) -> None:
        """The store dies and starts again from its records; some of its workers died, too, others may still write."""
        alive = [session for session in SESSIONS if session not in dead]
        writing = {session: set(self.ghosts.get(session, ())) for session in alive}
        for held in self.usable.values():
            if held.session in writing:
                writing[held.session] |= held.writable()
        sealed = {block.key: block.slot for block in self.store.cache}
        self.ghosts = writing
        self.held, self.asked, self.extending, self.joined = {}, {}, {}, {}
        self.pulling, self.read = {}, set()
        self.store = restore(self.records, BLOCK, 5.0, alive)
        self.store.readers.add(READER)
        assert {block.key: block.slot for block in self.store.cache} == sealed
        # Whoever watches gets a snapshot of the new epoch.
        self.known, self.seen = set(self.store.snapshot()), self.store.events.last

    @rule(seconds=st.sampled_from([1.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.store.tick(self.now)
        self.listen()

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def accounting_is_whole(self) -> None:
        assert check_integrity(self.store) == []

    @invariant()
    def nobody_writes_into_what_is_not_theirs(self) -> None:
        writers: dict[int, str] = {}
        claims = [(f"{h.session}/{h.lease_id}", h.writable()) for h in self.usable.values()]
        claims += [(f"pull {lease_id}", set(self.store.leases[lease_id].own)) for lease_id in self.pulling]
        claims += [(f"ghost {session}", slots) for session, slots in self.ghosts.items()]
        for name, slots in claims:
            for slot in slots:
                assert slot not in writers, f"slot {slot} belongs to {name} and {writers[slot]}"
                writers[slot] = name
        assert not self.store.pool.free_slots() & set(writers)
        assert not {block.slot for block in self.store.cache} & set(writers)

    @invariant()
    def what_a_joiner_reads_is_never_given_away(self) -> None:
        for lease_id, slots in self.joined.items():
            assert not self.store.pool.free_slots() & slots
            for held in self.usable.values():
                assert held.lease_id == lease_id or not held.writable() & slots
            for pulling in self.pulling:
                assert pulling == lease_id or not set(self.store.leases[pulling].own) & slots

    @invariant()
    def what_another_node_reads_stays(self) -> None:
        """Unless the store needed the slots and took the lease from it, which the generations tell."""
        for lease_id in self.read & set(self.store.leases):
            lease = self.store.leases[lease_id]
            if READER in lease.holders:
                assert not self.store.pool.free_slots() & set(lease.slots)

    @invariant()
    def a_pull_without_a_worker_was_told_to_stop(self) -> None:
        assert all(PULL in self.store.leases[lease_id].holders for lease_id in self.pulling)

    @invariant()
    def events_tell_what_is_cached_parents_first(self) -> None:
        parents = {block.key: block.parent for block in self.store.cache}
        for event in self.store.events.since(self.seen) or []:
            for key in event.keys:
                assert (key in self.known) == event.removed
                self.known.symmetric_difference_update([key])
        self.seen = self.store.events.last
        assert self.known == set(parents) | self.store.below == set(self.store.snapshot())
        assert all(parent is None or parent.key in self.known for parent in parents.values())

    @invariant()
    def the_oldest_waiter_does_not_wait_for_nothing(self) -> None:
        """All sessions obey reclaims: whoever waits, waits for older leases or for what is quarantined."""
        waiter = self.store.waiters.oldest
        if waiter and not self.ghosts and not self.pulling:
            younger = [lease for lease in self.store.leases.values() if lease.live and lease.age > waiter.age]
            assert not younger or any(lease.reclaiming for lease in younger)

    def teardown(self) -> None:
        """When everybody lets go, everything comes back and everybody who waits is served."""
        for session in list(self.ghosts):
            self.store.resolve(session)
        self.ghosts.clear()
        self.listen()
        for _ in range(200):
            self.now += 6.0
            self.store.tick(self.now)
            self.listen()
            for lease_id in list(self.pulling):
                self.finish_pull(lease_id)
            self.reader_goes()
            for lease_id in list(self.joined):
                if lease_id in self.joined:
                    self.leave(lease_id)
                    self.listen()
            for session, lease_id in list(self.held):
                if (session, lease_id) in self.held:
                    self.drop(session, lease_id)
                    self.listen()
        assert not self.store.waiters
        assert not self.store.leases
        assert check_integrity(self.store) == []


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
