"""Block events: numbered without a gap, bounded, merged without changing what they say."""

from __future__ import annotations

from headway.core.events import BlockEvent, BlockEvents, merge


def test_whoever_is_further_behind_than_the_log_reaches_needs_a_snapshot() -> None:
    events = BlockEvents(keep=3)
    for at in range(5):
        events.stored([bytes([at])])
    assert events.since(5) == []
    assert [event.first for event in events.since(2) or []] == [3, 4, 5]
    assert events.since(1) is None
    assert events.since(6) is None


def test_events_of_one_kind_that_follow_each_other_are_merged() -> None:
    events = BlockEvents()
    events.stored([b"a", b"b"])
    events.stored([b"c"])
    events.removed([b"c"])
    events.stored([b"d"])
    assert merge(events.since(0) or [], 10) == [
        BlockEvent(1, 2, [b"a", b"b", b"c"], removed=False),
        BlockEvent(3, 3, [b"c"], removed=True),
        BlockEvent(4, 4, [b"d"], removed=False),
    ]
    assert len(merge(events.since(0) or [], 2)) == 4
