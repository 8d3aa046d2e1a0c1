"""Eviction: leaves first, never what is held, reuse is a reason to stay; the study's policies keep to it too."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import evict as study
from bench.evict_policies import Arc, Belady, Fifo, Lru, S3Fifo, Sieve, TwoQueues
from headway.core.blocks import Block, BlockCache
from headway.core.evict import MOST_USES, AgedLfu, Candidates, Policy, Resident

CAPACITY = 6
MAKERS: list[Callable[[], Policy]] = [
    AgedLfu,
    *(lambda make=make: make(CAPACITY) for make in (Lru, Fifo, TwoQueues, Arc, S3Fifo, Sieve)),  # type: ignore[misc]
    lambda: Belady(CAPACITY, len),
]


def chain(name: int, length: int) -> list[bytes]:
    """Chains of the same first digit share their first two blocks."""
    return [b"%d/%d" % (name % 3 if at < 2 else name, at) for at in range(length)]


def use(cache: BlockCache, keys: list[bytes], capacity: int) -> list[Block]:
    """Hold a chain, evicting for what is missing; the blocks that got in, still held."""
    held: list[Block] = []
    for key in keys:
        block = cache.get(key)
        if block is not None:
            cache.hold(block)
        elif len(cache) < capacity or cache.evict() is not None:
            block = cache.add(key, 0, held[-1] if held else None)
        else:
            break
        held.append(block)
    return held


@settings(max_examples=150, deadline=None)
@given(
    maker=st.sampled_from(MAKERS),
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5), st.integers(0, 2)), max_size=60),
)
def test_any_policy_evicts_only_idle_leaves_and_everything_idle_can_go(
    maker: Callable[[], Policy], steps: list[tuple[int, int, int]]
) -> None:
    cache, open_uses = BlockCache(maker()), []
    for name, length, keep in steps:
        held = use(cache, chain(name, length), CAPACITY)
        open_uses.append(held)
        while len(open_uses) > keep:
            cache.drop(open_uses.pop(0))
        assert len(cache) <= CAPACITY
        for block in cache:
            assert block.parent is None or cache.get(block.parent.key) is block.parent
        assert all(cache.get(block.key) is block for held in open_uses for block in held)
        assert cache.idle == sum(1 for block in cache if not block.holds)
    for held in open_uses:
        cache.drop(held)
    gone = [cache.evict() for _ in range(len(cache))]
    assert None not in gone
    assert (len(cache), cache.idle, cache.evict()) == (0, 0, None)


def test_what_is_seen_once_does_not_push_out_what_is_seen_often() -> None:
    cache = BlockCache()
    often = [b"o/%d" % at for at in range(4)]
    for _ in range(3):
        cache.drop(use(cache, often, 8))
    for name in range(3):
        cache.drop(use(cache, [b"once %d/%d" % (name, at) for at in range(4)], 8))
        assert len(cache.match(often, 4)) == 4


def test_credit_for_reuse_ages_away_whatever_the_number_of_uses() -> None:
    cache = BlockCache()
    for _ in range(MOST_USES * 100):
        cache.drop(use(cache, [b"hot"], 4))
    turnovers = 0
    while cache.get(b"hot") is not None:
        for at in range(4):
            cache.drop(use(cache, [b"once %d/%d" % (turnovers, at)], 4))
        turnovers += 1
        assert turnovers < 3 * MOST_USES
    assert turnovers > MOST_USES // 2


def test_among_equals_the_least_recently_used_goes_and_a_leaf_before_its_parent() -> None:
    cache = BlockCache()
    for keys in ([b"a", b"a1"], [b"b"], [b"c"]):
        cache.drop(use(cache, keys, 9))
    assert [block.key for _ in range(4) if (block := cache.evict())] == [b"a1", b"a", b"b", b"c"]


def test_candidates_are_forgotten_when_withdrawn_and_the_heap_stays_small() -> None:
    candidates, blocks = Candidates(), [Resident(bytes([at])) for at in range(3)]
    for rank, block in enumerate(blocks):
        candidates.offer(block, rank)
    for turn in range(1000):
        candidates.offer(blocks[0], turn + 5)
    candidates.withdraw(blocks[1])
    candidates.withdraw(blocks[1])
    assert len(candidates._heap) <= 2 * len(candidates) + 65
    assert [candidates.take(), candidates.take(), candidates.take()] == [blocks[2], blocks[0], None]


def test_a_candidate_that_is_held_again_is_not_evicted() -> None:
    cache = BlockCache()
    block = cache.add(b"x", 0, None)
    cache.drop([block])
    cache.hold(block)
    assert cache.evict() is None
    cache.drop([block])
    assert cache.evict() is block


def test_the_study_counts_hits_of_full_blocks_and_never_all_of_a_prompt(tmp_path: Path) -> None:
    rows = [{"input_length": 1024, "hash_ids": [1, 2]}, {"input_length": 1024, "hash_ids": [1, 2]}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prompts = study.load(tmp_path / "t.jsonl", 1.0)
    assert [len(prompt.keys) for prompt in prompts] == [2, 2]
    # Of the second prompt's 1,024 tokens the first block is found: a match covers at most prompt - 1.
    assert study.replay(prompts, AgedLfu(), 10) == pytest.approx(512 / 2048)


def test_no_policy_beats_the_one_that_knows_the_future() -> None:
    pattern = [1, 2, 3, 1, 4, 5, 1, 2, 6, 3, 1, 7, 2, 1, 8, 4, 1, 2]
    prompts = [study.Prompt([b"%d" % name, b"%d/" % name], 1200) for name in itertools.chain(pattern, pattern)]
    future = study.Future.of(prompts)
    best = study.replay(prompts, Belady(CAPACITY, future.next_use), CAPACITY, future)
    rates = [study.replay(prompts, make(CAPACITY), CAPACITY) for make in study.POLICIES.values()]
    assert 0 < min(rates) <= max(rates) <= best
    assert max(rates) > study.replay(prompts, Fifo(CAPACITY), CAPACITY)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 6)), min_size=1, max_size=12), st.integers(0, 6))
def test_the_order_that_is_foretold_is_the_order_of_eviction(prompts: list[tuple[int, int]], held: int) -> None:
    cache, slots = BlockCache(), itertools.count()
    for name, length in prompts:
        blocks: list[Block] = []
        for key in chain(name, length):
            block = cache.get(key)
            if block is None:
                block = cache.add(key, next(slots), blocks[-1] if blocks else None)
            else:
                cache.hold(block)
            blocks.append(block)
        cache.drop(blocks)
    for block in cache.match(chain(0, held), held):
        cache.hold(block)
    foretold = list(cache.next_out())
    evicted: list[Block] = []
    while (victim := cache.evict()) is not None:
        evicted.append(victim)
    assert foretold == evicted
