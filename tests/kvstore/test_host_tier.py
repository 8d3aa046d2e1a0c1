"""The host tier by itself: what was put comes back right, and the least useful leaf gives way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.kvstore.tiers.contract import TierError
from services.kvstore.tiers.host import HostTier
from tests.kvstore.tier_rig import SLOT_BYTES, SLOTS, body_of, key_of, put, right, slot

News = list[tuple[list[bytes], list[bytes]]]


@pytest.fixture
def news() -> News:
    return []


@pytest.fixture
def tier(news: News) -> HostTier:
    return HostTier(SLOTS * SLOT_BYTES + 1, SLOT_BYTES, lambda stored, removed: news.append((stored, removed)))


def test_what_was_put_comes_back(tier: HostTier) -> None:
    keys = put(tier, 1, 2, 3)
    assert tier.leading([*keys, key_of(9)]) == right(tier, [*keys, key_of(9)]) == 3
    counts = tier.counts()
    assert (counts.blocks, counts.hits, counts.bytes_read, counts.bytes_written) == (
        3,
        3,
        3 * SLOT_BYTES,
        3 * SLOT_BYTES,
    )


def test_the_first_that_is_missing_ends_what_is_read(tier: HostTier) -> None:
    keys = put(tier, 1, 2)
    assert right(tier, [keys[0], key_of(9), keys[1]]) == 1


def test_leaves_give_way_and_are_told_of(tier: HostTier, news: News) -> None:
    first, second = put(tier, *range(4)), put(tier, *range(10, 14))
    right(tier, second)
    put(tier, 20, 21)
    assert (tier.leading(first), tier.leading(second)) == (2, 4)
    assert tier.counts().evicted == 2
    assert [removed for _, removed in news if removed] == [[first[3]], [first[2]]]
    assert [key for stored, _ in news for key in stored] == [*first, *second, key_of(20), key_of(21)]


def test_bytes_that_changed_while_they_were_copied_are_not_kept(tier: HostTier, news: News) -> None:
    for name in range(2 * SLOTS):
        assert tier.put(key_of(name), b"", memoryview(body_of(key_of(name))), lambda: False)
    assert not news or not any(stored for stored, _ in news)
    assert (tier.counts().blocks, tier.counts().dropped) == (0, 2 * SLOTS)
    keys = put(tier, *range(SLOTS))
    assert right(tier, keys) == SLOTS


def test_a_block_that_is_being_read_does_not_give_way(tier: HostTier) -> None:
    keys = put(tier, *range(4))

    class Views(list[memoryview]):
        """Whoever is about to fill them meets a writer that wants more slots than are left."""

        def __iter__(self) -> Iterator[memoryview]:
            for name in range(10, 10 + 2 * SLOTS):
                tier.put(key_of(name), b"", memoryview(body_of(key_of(name))))
            return super().__iter__()

    views = Views(slot() for _ in keys)
    assert tier.get(keys, views) == 4
    for key, view in zip(keys, list.__iter__(views), strict=True):
        assert bytes(view[:SLOT_BYTES]) == body_of(key)
    assert tier.counts().evicted
    # And does so again afterwards.
    put(tier, *range(100, 100 + 2 * SLOTS))
    assert tier.leading(keys) < 4


def test_a_closed_tier_takes_and_gives_nothing(tier: HostTier) -> None:
    keys = put(tier, 1)
    tier.close()
    assert not tier.put(key_of(2), b"", slot()[:SLOT_BYTES])
    assert tier.get(keys, [slot()]) == 0


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (SLOT_BYTES - 1, f"host_bytes is {SLOT_BYTES - 1}; one block takes {SLOT_BYTES} bytes: enlarge it"),
        (1 << 50, r"the host has \d+ bytes free: make it smaller"),
    ],
)
def test_a_tier_that_cannot_be_had_says_what_to_change(size: int, sentence: str) -> None:
    with pytest.raises(TierError, match=sentence):
        HostTier(size, SLOT_BYTES)


def test_a_view_of_another_size_is_refused(tier: HostTier) -> None:
    with pytest.raises(ValueError, match=f"a block here is {SLOT_BYTES} bytes; this view has {SLOT_BYTES - 1}"):
        tier.put(key_of(1), b"", memoryview(bytes(SLOT_BYTES - 1)))
