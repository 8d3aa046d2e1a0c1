"""The index of a tier's slots, under any order of puts, reads, losses and restarts."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headway.core.keys import ROOT
from services.kvstore.tiers.index import Entry, SlotIndex, rebuild
from services.kvstore.tiers.layout import Header

SLOTS = 5
# Two chains of five that share their first two blocks.
CHAINS = [[b"a0", b"a1", b"a2", b"a3", b"a4"], [b"a0", b"a1", b"b2", b"b3", b"b4"]]
PARENT = {key: chain[at - 1] if at else ROOT for chain in CHAINS for at, key in enumerate(chain)}
KEYS = sorted(PARENT)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = SlotIndex(SLOTS)
        self.generation = 0
        self.writing: list[int] = []
        self.reading: list[list[Entry]] = []

    @rule(key=st.sampled_from(KEYS), finished=st.booleans())
    def put(self, key: bytes, finished: bool) -> None:
        if self.index.get(key) is not None:
            return
        free, before = self.index.free, list(self.index)
        taken = self.index.take_slot()
        if taken is None:
            assert not free
            # Whoever could give way is read, or continued by one that is.
            held = {id(entry) for entries in self.reading for entry in entries}
            assert all(id(entry) in held or entry.children for entry in before)
            return
        slot, victim = taken
        if victim is not None:
            assert not free
            assert not victim.holds
            assert not any(PARENT[entry.key] == victim.key for entry in self.index)
        if not finished:
            self.writing.append(slot)
            return
        self.generation += 1
        self.index.add(key, PARENT[key], slot, self.generation, 0)

    @precondition(lambda self: self.writing)
    @rule()
    def fail_to_write(self) -> None:
        self.index.give_slot(self.writing.pop())

    @rule(chain=st.sampled_from(CHAINS))
    def start_reading(self, chain: list[bytes]) -> None:
        entries = self.index.leading(chain)
        self.index.hold(entries)
        self.reading.append(entries)

    @precondition(lambda self: self.reading)
    @rule(good=st.integers(0, 5))
    def end_reading(self, good: int) -> None:
        entries = self.reading.pop(0)
        for entry in entries[good : good + 1]:
            self.index.remove(entry)
        self.index.touch([entry for entry in entries[:good] if not entry.gone])
        self.index.release(entries)

    @precondition(lambda self: not self.reading and not self.writing)
    @rule()
    def restart(self) -> None:
        entries = list(self.index)
        found = [(e.slot, Header(e.key, e.parent_key, e.generation, 1, e.checksum)) for e in entries]
        self.index, last = rebuild(SLOTS, reversed(found))
        assert last == max((entry.generation for entry in entries), default=0)
        assert sorted(entry.key for entry in self.index) == sorted(entry.key for entry in entries)

    @invariant()
    def every_slot_is_in_one_place(self) -> None:
        used = [entry.slot for entry in self.index]
        gone = {id(entry): entry.slot for entries in self.reading for entry in entries if entry.gone}
        everywhere = [*used, *self.index._free, *self.writing, *gone.values()]
        assert sorted(everywhere) == list(range(SLOTS))

    @invariant()
    def parents_and_children_know_each_other_and_nobody_else(self) -> None:
        entries = {entry.key: entry for entry in self.index}
        for key, entry in entries.items():
            assert entry.parent is entries.get(PARENT[key])
            assert set(entry.children) == {other for other in entries if PARENT[other] == key}
        waiting = {key for orphans in self.index._orphans.values() for key in orphans}
        assert waiting == {key for key in entries if PARENT[key] != ROOT and PARENT[key] not in entries}

    def teardown(self) -> None:
        while self.reading:
            self.end_reading(5)
        while self.writing:
            self.fail_to_write()
        slots = [taken[0] for _ in range(SLOTS) if (taken := self.index.take_slot())]
        assert sorted(slots) == list(range(SLOTS))


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
