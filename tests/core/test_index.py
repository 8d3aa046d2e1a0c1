"""The prefix index: bisection over chains, bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headway.core.index import PrefixIndex
from headway.core.keys import block_keys


def chain(tokens: list[int]) -> list[bytes]:
    return block_keys(b"n" * 32, tokens, 4)


def test_overlap_is_the_leading_run_on_each_node() -> None:
    index = PrefixIndex(100)
    keys = chain(list(range(40)))
    index.stored("a", keys[:7])
    index.stored("b", keys)
    index.snapshot("c")
    assert index.overlap(keys) == {"a": 7, "b": 10, "c": 0}
    assert index.overlap([]) == {"a": 0, "b": 0, "c": 0}


def test_removed_blocks_and_what_follows_them_are_not_claimed() -> None:
    index = PrefixIndex(100)
    keys = chain(list(range(40)))
    index.stored("a", keys)
    index.removed("a", keys[6:])
    assert index.overlap(keys) == {"a": 6}
    index.removed("a", keys[:1])
    assert index.overlap(keys) == {"a": 0}


def test_snapshot_forgets_the_node_only() -> None:
    index = PrefixIndex(100)
    keys = chain(list(range(8)))
    index.stored("a", keys)
    index.stored("b", keys)
    index.snapshot("a")
    assert index.overlap(keys) == {"a": 0, "b": 2}
    index.forget("a")
    assert index.overlap(keys) == {"b": 2}


def test_a_full_node_stops_learning_and_says_so() -> None:
    index = PrefixIndex(3)
    keys = chain(list(range(40)))
    assert index.stored("a", keys[:3])
    assert not index.full("a")
    assert not index.stored("a", keys[3:])
    assert index.full("a")
    assert index.overlap(keys) == {"a": 3}
    assert index.blocks("a") == 3
    index.snapshot("a")
    assert not index.full("a")


@given(st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=6), st.lists(st.integers(0, 2), max_size=24))
def test_overlap_equals_a_walk_while_residence_is_prefix_closed(stored: list[list[int]], asked: list[int]) -> None:
    index = PrefixIndex(1000)
    resident: set[bytes] = set()
    for tokens in stored:
        index.stored("a", chain(tokens))
        resident.update(chain(tokens))
    walked = 0
    for key in chain(asked):
        if key not in resident:
            break
        walked += 1
    assert index.overlap(chain(asked)).get("a", 0) == walked


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 30), max_size=8)), max_size=40))
def test_memory_is_bounded_whatever_comes(events: list[tuple[bool, list[int]]]) -> None:
    index = PrefixIndex(10)
    for stored, numbers in events:
        keys = [bytes([number]) * 16 for number in numbers]
        if stored:
            index.stored("a", keys)
        else:
            index.removed("a", keys)
        assert index.blocks("a") <= 10
