"""The prefix index: bisection over chains, any order of events, bounded memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headway.core.index import PrefixIndex
from headway.core.keys import block_keys, join_keys

NODES = st.sampled_from("abc")


def chain(tokens: list[int]) -> list[bytes]:
    return block_keys(b"n" * 32, tokens, 4)


KEYS = chain(list(range(40)))


def stored(index: PrefixIndex, node: str, keys: list[bytes]) -> bool:
    return index.stored(node, join_keys(keys))


def removed(index: PrefixIndex, node: str, keys: list[bytes]) -> None:
    index.removed(node, join_keys(keys))


def test_overlap_is_the_leading_run_on_each_node() -> None:
    index = PrefixIndex(100)
    stored(index, "a", KEYS[:7])
    stored(index, "b", KEYS)
    stored(index, "c", KEYS[:1])
    index.snapshot("d")
    assert index.overlap(KEYS) == {"a": 7, "b": 10, "c": 1}
    assert index.overlap(KEYS[:3]) == {"a": 3, "b": 3, "c": 1}
    assert index.overlap([]) == {}


def test_removed_blocks_and_what_follows_them_are_not_claimed() -> None:
    index = PrefixIndex(100)
    stored(index, "a", KEYS)
    removed(index, "a", KEYS[6:])
    assert index.overlap(KEYS) == {"a": 6}
    removed(index, "a", KEYS[:1])
    assert index.overlap(KEYS) == {}


def test_snapshot_forgets_the_node_only() -> None:
    index = PrefixIndex(100)
    stored(index, "a", KEYS[:2])
    stored(index, "b", KEYS[:2])
    index.snapshot("a")
    assert index.overlap(KEYS) == {"b": 2}
    assert index.blocks("a") == 0
    index.forget("a")
    assert index.overlap(KEYS) == {"b": 2}


def test_a_full_index_stops_learning_and_says_so() -> None:
    index = PrefixIndex(3)
    assert stored(index, "a", KEYS[:3])
    assert not index.full("a")
    assert not stored(index, "a", KEYS[3:])
    assert index.full("a")
    assert index.overlap(KEYS) == {"a": 3}
    # What is known already may have more holders.
    assert stored(index, "b", KEYS[:3])
    assert (index.blocks("a"), index.blocks("b"), len(index)) == (3, 3, 3)
    index.snapshot("a")
    assert not index.full("a")


def test_room_that_a_former_account_took_comes_back() -> None:
    index = PrefixIndex(8)
    stored(index, "a", KEYS[:8])
    index.snapshot("a")
    for _ in range(5000):
        stored(index, "b", KEYS[8:9])
    assert index.overlap(KEYS[8:]) == {"b": 1}
    assert len(index) == 1


def test_nodes_that_come_and_go_leave_nothing_behind() -> None:
    index = PrefixIndex(1000)
    for number in range(300):
        stored(index, str(number), KEYS)
        index.forget(str(number))
    for _ in range(10_000):
        stored(index, "last", KEYS[:1])
    assert len(index) == 1
    # Bits are given out again, so that masks stay small.
    made = index._bits_made
    for number in range(100):
        stored(index, f"new {number}", KEYS)
    assert index._bits_made == made


def test_keys_that_are_cut_short_are_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes each; got 17"):
        PrefixIndex(10).stored("a", bytes(17))


@given(st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=6), st.lists(st.integers(0, 2), max_size=24))
def test_overlap_equals_a_walk_while_residence_is_prefix_closed(lists: list[list[int]], asked: list[int]) -> None:
    index = PrefixIndex(1000)
    resident: dict[str, set[bytes]] = {"a": set(), "b": set()}
    for number, tokens in enumerate(lists):
        node = "ab"[number % 2]
        stored(index, node, chain(tokens))
        resident[node].update(chain(tokens))
    for node, keys in resident.items():
        walked = 0
        for key in chain(asked):
            if key not in keys:
                break
            walked += 1
        assert index.overlap(chain(asked)).get(node, 0) == walked


class IndexMachine(RuleBasedStateMachine):
    """Any order of events, as after gaps and restarts: what is claimed was stored and not removed since."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(12)
        self.known: dict[str, set[bytes]] = {}

    @rule(node=NODES, numbers=st.lists(st.integers(0, 30), max_size=8))
    def store(self, node: str, numbers: list[int]) -> None:
        keys = [bytes([number]) * 16 for number in numbers]
        everywhere = set().union(*self.known.values())
        complete = stored(self.index, node, keys)
        self.known.setdefault(node, set()).update(keys if complete else everywhere.intersection(keys))
        if not complete:
            self.known[node].update(key for key in keys if self.index.overlap([key]).get(node))

    @rule(node=NODES, numbers=st.lists(st.integers(0, 30), max_size=8))
    def remove(self, node: str, numbers: list[int]) -> None:
        keys = [bytes([number]) * 16 for number in numbers]
        removed(self.index, node, keys)
        self.known.get(node, set()).difference_update(keys)

    @rule(node=NODES)
    def snapshot(self, node: str) -> None:
        self.index.snapshot(node)
        self.known[node] = set()

    @rule(node=NODES)
    def forget(self, node: str) -> None:
        self.index.forget(node)
        self.known.pop(node, None)

    @invariant()
    def holds(self) -> None:
        assert len(self.index) <= 12
        for node in "abc":
            known = self.known.get(node, set())
            assert self.index.blocks(node) == len(known)
        for number in range(31):
            key = bytes([number]) * 16
            holders = {node for node, keys in self.known.items() if key in keys}
            assert self.index.overlap([key]).keys() == holders


TestIndexMachine = IndexMachine.TestCase
