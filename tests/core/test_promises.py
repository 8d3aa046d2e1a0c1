"""Prefixes that will be cached: by common root, newest first, gone with their prompts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headway.core.ask import Promised
from headway.core.keys import block_keys
from headway.core.promises import MOST, Promises

TOKENS = st.lists(st.integers(0, 1), max_size=24)


def chain(tokens: list[int]) -> list[bytes]:
    return block_keys(b"n" * 32, tokens, 2)


@given(st.lists(TOKENS, max_size=6), TOKENS)
def test_overlap_is_the_longest_common_prefix_of_each_worker(prompts: list[list[int]], asked: list[int]) -> None:
    promises, expected = Promises(), dict[str, int]()
    for number, tokens in enumerate(prompts):
        node = "ab"[number % 2]
        promises.add(number, node, chain(tokens), float(number))
        common = 0
        for ours, theirs in zip(chain(asked), chain(tokens), strict=False):
            if ours != theirs:
                break
            common += 1
        if common:
            expected[node] = max(expected.get(node, 0), common)
    found = promises.overlap(chain(asked))
    assert {node: promised.tokens for node, promised in found.items()} == expected
    for number in range(len(prompts)):
        promises.remove(number)
        promises.remove(number)
    assert promises.overlap(chain(asked)) == {}
    assert not promises._roots
    assert not promises._chains


def test_what_is_only_pulled_is_no_promise() -> None:
    promises = Promises()
    keys = chain([1] * 12)
    promises.add("a", "worker", keys, 7.0, pulled=4)
    assert promises.overlap(keys[:4]) == {}
    assert promises.overlap(keys[:5]) == {"worker": Promised(5, 7.0, "a")}


def test_of_equal_promises_the_one_that_is_kept_first_counts() -> None:
    promises = Promises()
    for ready_s in (3.0, 1.0, 2.0):
        promises.add(ready_s, "worker", chain([1] * 4), ready_s)
    promises.add("short", "worker", chain([1] * 2), 0.5)
    assert promises.overlap(chain([1] * 4), 16) == {"worker": Promised(32, 1.0, 1.0)}


def test_one_root_keeps_its_newest() -> None:
    promises = Promises()
    keys = chain([1, 2, 3, 4])
    for number in range(3 * MOST):
        promises.add(number, str(number), keys, 0.0)
    assert len(promises.overlap(keys)) == MOST
    promises.remove(0)
    promises.add(5, "again", keys, 0.0)
    assert promises.overlap(keys)["again"] == Promised(2, 0.0, 5)
