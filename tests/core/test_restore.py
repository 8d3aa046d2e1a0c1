"""Killed between any two writes of its records, a store comes back whole: nothing wrong is served, no slot lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.audit import check_integrity
from headway.core.keys import block_keys
from headway.core.leases import Changed, Granted
from headway.core.records import SEALED, TAKEN, ForgetfulRecords
from headway.core.restore import restore
from headway.core.store import Store

BLOCK, SLOTS = 4, 10
PROMPTS = [[seed] * length for seed in (1, 2, 3) for length in (4, 9, 17)] + [[1] * 8 + [2] * 9]


class Killed(Exception):
    pass


class Cells(list[int]):
    """Numbers whose writes are counted."""

    def __init__(self, values: list[int], records: MortalRecords) -> None:
        super().__init__(values)
        self._records = records

    def __setitem__(self, slot: int, value: int) -> None:  # type: ignore[override]
        self._records.count()
        super().__setitem__(slot, value)


class MortalRecords:
    """Die before the write number `last`."""

    def __init__(self, slots: int, last: int) -> None:
        self.left = last
        self.states = Cells([0] * slots, self)
        self.generations = Cells([0] * slots, self)
        self.blocks: dict[int, tuple[bytes, int | None]] = {}

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def seal(self, slot: int, key: bytes, parent: int | None) -> None:
        self.count()
        self.blocks[slot] = (key, parent)
        self.states[slot] = SEALED

    def block(self, slot: int) -> tuple[bytes, int | None]:
        return self.blocks[slot]

    def survived(self) -> ForgetfulRecords:
        """As the next process finds them."""
        found = ForgetfulRecords(len(self.states))
        for slot, (key, parent) in self.blocks.items():
            found.seal(slot, key, parent)
        for slot in range(len(self.states)):
            found.states[slot] = self.states[slot]
            found.generations[slot] = self.generations[slot]
        return found


class Life:
    """A store and what its worker wrote: `content` of each slot, the key whose bytes it holds."""

    def __init__(self, kill_at: int) -> None:
        self.records = MortalRecords(SLOTS, kill_at)
        self.store = Store(self.records, BLOCK, 5.0)
        self.content: dict[int, bytes] = {}
        self.leases: list[tuple[int, list[int], list[bytes]]] = []
        self.numbers = iter(range(1, 1 << 30))

    def step(self, choice: int, which: int) -> None:
        store = self.store
        if choice < 2:
            keys = block_keys(b"n", PROMPTS[which % len(PROMPTS)], BLOCK)
            tokens = len(PROMPTS[which % len(PROMPTS)])
            number = next(self.numbers)
            granted = store.acquire(
                "w", number, keys=keys, tokens=tokens, growth=0, arrival_s=float(number), deadline_s=1.0
            )
            if isinstance(granted, Granted):
                # The worker writes as soon as it has the slots, sealed or not.
                for slot, key in list(zip(granted.slots, keys, strict=False))[granted.cached_tokens // BLOCK :]:
                    self.content[slot] = key
                self.leases.append((granted.lease_id, granted.slots, keys))
            else:
                store.tick(2.0)
        elif self.leases:
            lease_id, _, keys = self.leases[which % len(self.leases)]
            if choice == 2:
                sealed = len(store.leases[lease_id].blocks)
                parent = keys[sealed - 1] if sealed else b""
                assert isinstance(store.seal("w", lease_id, first=sealed, keys=keys[sealed:], parent=parent), Changed)
            else:
                self.leases.pop(which % len(self.leases))
                store.release("w", lease_id)
        store.instructions()


@settings(max_examples=400, deadline=None)
@given(
    kill_at=st.integers(0, 120),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50)), min_size=5, max_size=60),
    alive=st.booleans(),
)
def test_a_kill_between_any_two_writes_loses_and_doubles_nothing(
    kill_at: int, steps: list[tuple[int, int]], alive: bool
) -> None:
    life = Life(kill_at)
    try:
        for choice, which in steps:
            life.step(choice, which)
    except Killed:
        pass
    records = life.records.survived()
    generations = list(records.generations)
    former_taken = {slot for slot in range(SLOTS) if records.states[slot] == TAKEN}
    store = restore(records, BLOCK, 5.0, {"w"} if alive else set())
    assert check_integrity(store) == []
    for block in store.cache:
        # What is served is what was completely written and sealed.
        assert life.content[block.slot] == block.key
    assert all(now >= then for now, then in zip(records.generations, generations, strict=True))
    if alive:
        assert not store.pool.free_slots() & former_taken
        store.resolve("w")
    assert check_integrity(store) == []
    assert store.pool.free + len(store.cache) == SLOTS


def test_a_block_without_its_parent_is_not_served() -> None:
    records = ForgetfulRecords(4)
    records.seal(0, b"root", None)
    records.seal(1, b"child", 0)
    records.seal(2, b"orphan", 3)
    store = restore(records, BLOCK, 5.0, set())
    assert {block.key for block in store.cache} == {b"root", b"child"}
    assert store.pool.free == 2


def test_restored_blocks_can_be_evicted_leaves_first() -> None:
    records = ForgetfulRecords(3)
    for slot, key in enumerate((b"a", b"b", b"c")):
        records.seal(slot, key, slot - 1 if slot else None)
    store = restore(records, BLOCK, 5.0, set())
    assert store.cache.idle == 3
    assert [block.key for block in iter(store.cache.evict, None)] == [b"c", b"b", b"a"]
