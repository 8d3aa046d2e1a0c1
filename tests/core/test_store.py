"""Leases, seals, handoff, eviction, quarantine and waiting, one rule a test."""

from __future__ import annotations

import pytest

from headway.core.audit import check_integrity
from headway.core.instructions import Offer, Reclaim, Reply
from headway.core.keys import block_keys
from headway.core.leases import Added, Changed, Done, Granted, Problem, Refused, Result
from headway.core.records import ForgetfulRecords
from headway.core.slots import SlotPool
from headway.core.store import Store

BLOCK = 4


def keys(tokens: list[int]) -> list[bytes]:
    return block_keys(b"n", tokens, BLOCK)


class Bench:
    """A store with requests named by their tokens; integrity holds after every operation."""

    def __init__(self, slots: int = 16) -> None:
        self.store = Store(ForgetfulRecords(slots), BLOCK, handoff_hold_s=10.0)
        self.last = 0

    def acquire(
        self, session: str, tokens: list[int], growth: int = 0, arrival_s: float = 0.0, **more: str
    ) -> Result | None:
        self.last += 1
        result = self.store.acquire(
            session,
            self.last,
            keys=keys(tokens),
            tokens=len(tokens),
            growth=growth,
            arrival_s=arrival_s,
            deadline_s=100.0,
            **more,  # type: ignore[arg-type]
        )
        self.check()
        return result

    def granted(self, session: str, tokens: list[int], growth: int = 0, arrival_s: float = 0.0, **more: str) -> Granted:
        result = self.acquire(session, tokens, growth, arrival_s, **more)
        assert isinstance(result, Granted)
        return result

    def seal(self, session: str, lease_id: int, tokens: list[int], first: int = 0) -> Result:
        chain = keys(tokens)
        parent = chain[first - 1] if first else b""
        result = self.store.seal(session, lease_id, first=first, keys=chain[first:], parent=parent)
        self.check()
        return result

    def cached(self, tokens: list[int]) -> Granted:
        """Compute, seal and release a prompt: it is cached afterwards."""
        lease = self.granted("warm", tokens)
        self.seal("warm", lease.lease_id, tokens)
        self.release("warm", lease.lease_id)
        return lease

    def release(self, session: str, lease_id: int) -> None:
        assert self.store.release(session, lease_id) == Done()
        self.check()

    def check(self) -> None:
        assert check_integrity(self.store) == []

    def counts(self) -> tuple[int, int, int, int]:
        counts = self.store.counts()
        return counts["free"], counts["leased"], counts["cached"], counts["quarantined"]


def refusal(result: Result | None) -> Problem:
    assert isinstance(result, Refused)
    assert len(result.message) > 20
    return result.problem


A, B = list(range(10)), list(range(100, 110))


def test_a_slot_freed_twice_is_an_error_and_generations_rise() -> None:
    pool = SlotPool(ForgetfulRecords(4))
    slots = pool.take(2)
    before = [pool.generations[slot] for slot in slots]
    pool.give(slots)
    assert [pool.generations[slot] for slot in slots] == [was + 1 for was in before]
    with pytest.raises(ValueError, match="freed twice"):
        pool.give(slots)
    with pytest.raises(ValueError, match="5 slots"):
        pool.take(5)


def test_a_lease_covers_tokens_and_growth_and_comes_back() -> None:
    bench = Bench()
    lease = bench.granted("p", A, growth=7)
    assert (len(lease.slots), lease.cached_tokens) == (5, 0)
    assert bench.counts() == (11, 5, 0, 0)
    bench.release("p", lease.lease_id)
    assert bench.counts() == (16, 0, 0, 0)
    bench.release("p", lease.lease_id)


def test_sealed_blocks_are_found_but_never_the_whole_prompt() -> None:
    bench = Bench()
    bench.cached(list(range(8)))
    again = bench.granted("p", list(range(8)))
    assert again.cached_tokens == 4
    longer = bench.granted("q", list(range(9)))
    assert longer.cached_tokens == 8
    assert longer.slots[:1] == again.slots[:1]


def test_a_duplicate_seal_switches_to_the_block_that_is_there() -> None:
    bench = Bench()
    first, second = bench.granted("p", A), bench.granted("q", A)
    assert bench.seal("p", first.lease_id, A) == Changed([], 8)
    changed = bench.seal("q", second.lease_id, A)
    assert changed == Changed([(0, first.slots[0]), (1, first.slots[1])], 8)
    free = bench.store.pool.free
    # Until its next operation q may still read its own slots: they must not be given to anyone.
    assert bench.store.pool.free_slots().isdisjoint(second.slots[:2])
    bench.store.extend("q", 99, second.lease_id, blocks=0, deadline_s=1.0)
    assert bench.store.pool.free == free + 2
    bench.check()


def test_seals_follow_the_chain() -> None:
    bench = Bench()
    lease = bench.granted("p", A)
    assert refusal(bench.seal("p", lease.lease_id, A, first=1)) is Problem.BROKEN_CHAIN
    assert refusal(bench.seal("q", lease.lease_id, A)) is Problem.NOT_YOURS
    assert refusal(bench.seal("p", 99, A)) is Problem.UNKNOWN
    wrong = bench.store.seal("p", lease.lease_id, first=0, keys=keys(A), parent=b"x" * 16)
    assert refusal(wrong) is Problem.BROKEN_CHAIN


def test_refresh_takes_what_a_sibling_sealed() -> None:
    bench = Bench()
    first, second = bench.granted("p", A), bench.granted("q", A)
    bench.seal("p", first.lease_id, A)
    refreshed = bench.store.refresh("q", second.lease_id, 0)
    assert refreshed == Changed([(0, first.slots[0]), (1, first.slots[1])], 8)
    bench.check()
    assert bench.store.refresh("q", second.lease_id, 8) == Changed([], 8)
    bench.check()


def test_only_the_named_joiner_joins() -> None:
    bench = Bench()
    lease = bench.granted("p", A, joiner="decode-0")
    assert refusal(bench.store.join("x", "decode-1", lease.lease_id)) is Problem.NOT_YOURS
    assert refusal(bench.store.join("d", "decode-0", 99)) is Problem.UNKNOWN
    assert isinstance(bench.store.join("d", "decode-0", lease.lease_id), Granted)
    assert bench.store.hand_off("p", lease.lease_id, 0.0) == Done()
    assert bench.store.instructions() == []
    bench.release("p", lease.lease_id)
    assert bench.counts()[1] == 3
    bench.release("d", lease.lease_id)
    assert bench.counts() == (16, 0, 0, 0)


def test_handoff_passes_the_lease_to_an_attached_joiner_at_once() -> None:
    bench = Bench()
    lease = bench.granted("p", A, joiner="decode-0", request=("r", 1))  # type: ignore[arg-type]
    bench.store.hand_off("p", lease.lease_id, 0.0, "d")
    assert bench.store.instructions() == [Offer("d", ("r", 1), Granted(lease.lease_id, lease.slots, 0))]
    bench.store.tick(1000.0)
    bench.check()
    assert bench.counts()[1] == 3
    bench.release("d", lease.lease_id)
    assert bench.counts() == (16, 0, 0, 0)


def test_an_early_offer_makes_the_joiner_a_holder_beside_prefill() -> None:
    bench = Bench()
    lease = bench.granted("p", A, joiner="decode-0")
    assert bench.store.offer("p", lease.lease_id, None) == Done()
    assert bench.store.instructions() == []
    assert bench.store.offer("p", lease.lease_id, "d") == Done()
    assert [type(item) for item in bench.store.instructions()] == [Offer]
    bench.store.hand_off("p", lease.lease_id, 0.0, "d")
    assert bench.store.instructions() == []
    bench.release("d", lease.lease_id)
    assert bench.counts() == (16, 0, 0, 0)


def test_a_lease_without_joiner_is_held_for_a_bounded_time() -> None:
    bench = Bench()
    lease = bench.granted("p", A, joiner="decode-0")
    bench.store.hand_off("p", lease.lease_id, 5.0)
    bench.store.resolve("p")
    bench.store.tick(14.9)
    assert bench.counts()[1] == 3
    bench.store.tick(15.0)
    bench.check()
    assert bench.counts() == (16, 0, 0, 0)
    assert refusal(bench.store.join("d", "decode-0", lease.lease_id)) is Problem.UNKNOWN


def test_the_owner_can_end_the_hold_but_not_the_joiners_lease() -> None:
    bench = Bench()
    held = bench.granted("p", A, joiner="decode-0")
    bench.store.hand_off("p", held.lease_id, 0.0)
    bench.release("p", held.lease_id)
    assert bench.counts() == (16, 0, 0, 0)
    joined = bench.granted("p", A, joiner="decode-0")
    bench.store.hand_off("p", joined.lease_id, 0.0, "d")
    bench.release("p", joined.lease_id)
    assert bench.counts()[1] == 3


def test_the_least_recently_used_leaf_goes_first_and_is_withdrawn() -> None:
    bench = Bench(6)
    old, new = list(range(8)), list(range(50, 58))
    bench.cached(old)
    bench.cached(new)
    bench.granted("p", list(range(200, 212)))
    cached = {block.key for block in bench.store.cache}
    assert cached == {keys(old)[0], *keys(new)}
    removed = [event.keys for event in bench.store.events.since(0) or [] if event.removed]
    assert removed == [[keys(old)[1]]]


def test_blocks_in_use_are_never_evicted() -> None:
    bench = Bench(6)
    bench.cached(list(range(8)))
    user = bench.granted("p", list(range(9)))
    assert user.cached_tokens == 8
    assert bench.acquire("q", list(range(300, 313))) is None
    assert {block.key for block in bench.store.cache} == set(keys(list(range(8))))


def test_what_can_never_fit_is_refused_at_once() -> None:
    bench = Bench(4)
    assert refusal(bench.acquire("p", list(range(17)))) is Problem.TOO_LARGE
    lease = bench.granted("p", list(range(16)))
    too_much = bench.store.extend("p", 1, lease.lease_id, blocks=1, deadline_s=1.0)
    assert refusal(too_much) is Problem.TOO_LARGE


def test_waiters_are_served_oldest_first_and_nobody_overtakes() -> None:
    bench = Bench(4)
    first = bench.granted("p", list(range(16)), arrival_s=0.0)
    assert bench.acquire("q", list(range(100, 112)), arrival_s=2.0) is None
    assert bench.acquire("r", [1], arrival_s=3.0) is None
    assert bench.acquire("s", list(range(200, 216)), arrival_s=1.0) is None
    assert bench.store.instructions() == []
    bench.release("p", first.lease_id)
    served = [item.session for item in bench.store.instructions() if isinstance(item, Reply)]
    assert served == ["s"]


def test_a_small_young_acquire_waits_behind_a_large_old_one() -> None:
    bench = Bench(4)
    lease = bench.granted("p", list(range(8)), arrival_s=0.0)
    assert bench.acquire("q", list(range(100, 112)), arrival_s=1.0) is None
    assert bench.acquire("r", [1], arrival_s=2.0) is None
    bench.release("p", lease.lease_id)
    assert [item.session for item in bench.store.instructions() if isinstance(item, Reply)] == ["q", "r"]


def test_the_youngest_lease_gives_way_to_an_older_request() -> None:
    bench = Bench(4)
    bench.granted("p", list(range(8)), arrival_s=1.0)
    young = bench.granted("q", list(range(50, 58)), arrival_s=5.0)
    assert bench.acquire("r", list(range(100, 104)), arrival_s=2.0) is None
    assert bench.store.instructions() == [Reclaim("q", young.lease_id)]
    bench.release("q", young.lease_id)
    assert [item.session for item in bench.store.instructions() if isinstance(item, Reply)] == ["r"]


def test_an_extension_of_the_youngest_is_refused_and_of_the_oldest_served() -> None:
    bench = Bench(4)
    old = bench.granted("p", list(range(8)), arrival_s=1.0)
    young = bench.granted("q", list(range(50, 58)), arrival_s=5.0)
    mine = bench.store.extend("q", 7, young.lease_id, blocks=1, deadline_s=9.0)
    assert refusal(mine) is Problem.RECLAIMED
    assert bench.store.extend("p", 8, old.lease_id, blocks=1, deadline_s=9.0) is None
    assert bench.store.instructions() == [Reclaim("q", young.lease_id)]
    bench.release("q", young.lease_id)
    (reply,) = bench.store.instructions()
    assert isinstance(reply, Reply)
    assert isinstance(reply.result, Added)
    bench.check()


def test_waiting_ends_in_time_or_when_cancelled() -> None:
    bench = Bench(4)
    bench.granted("p", list(range(16)))
    assert bench.acquire("q", A, arrival_s=1.0, request=("r", 0)) is None  # type: ignore[arg-type]
    bench.store.cancel_acquire("q", ("r", 0))
    assert not bench.store.waiters
    (cancelled,) = bench.store.instructions()
    assert isinstance(cancelled, Reply)
    assert refusal(cancelled.result) is Problem.CANCELLED
    assert bench.acquire("q", A, arrival_s=1.0) is None
    bench.store.tick(99.9)
    assert bench.store.instructions() == []
    bench.store.tick(100.0)
    (reply,) = bench.store.instructions()
    assert isinstance(reply, Reply)
    assert refusal(reply.result) is Problem.NO_SLOTS


def test_what_a_suspended_worker_may_still_read_and_write_is_left_alone() -> None:
    bench = Bench(6)
    lease = bench.granted("p", A, growth=4)
    bench.seal("p", lease.lease_id, A)
    bench.store.suspend("p")
    bench.check()
    assert bench.counts() == (2, 2, 0, 2)
    assert bench.acquire("q", list(range(300, 312)), growth=4, arrival_s=1.0) is None
    assert bench.store.pool.free_slots().isdisjoint(lease.slots)
    bench.store.resolve("p")
    bench.check()
    assert [type(item) for item in bench.store.instructions()] == [Reply]


def test_a_suspended_owner_does_not_stop_the_joiner() -> None:
    bench = Bench()
    lease = bench.granted("p", A, joiner="decode-0")
    bench.store.join("d", "decode-0", lease.lease_id)
    bench.store.suspend("p")
    bench.check()
    assert bench.counts() == (13, 3, 0, 0)
    bench.release("d", lease.lease_id)
    assert bench.counts() == (13, 0, 0, 3)
    bench.store.resolve("p")
    bench.check()
    assert bench.counts() == (16, 0, 0, 0)


def test_a_dead_worker_leaves_nothing() -> None:
    bench = Bench(4)
    bench.granted("p", list(range(16)))
    assert bench.acquire("q", A, arrival_s=1.0) is None
    bench.store.resolve("q")
    bench.store.resolve("p")
    bench.check()
    assert bench.store.instructions() == []
    assert bench.counts() == (4, 0, 0, 0)


def test_losers_of_a_suspended_worker_are_quarantined_too() -> None:
    bench = Bench()
    first, second = bench.granted("p", A), bench.granted("q", A)
    bench.seal("p", first.lease_id, A)
    bench.seal("q", second.lease_id, A)
    bench.store.suspend("q")
    bench.check()
    assert bench.counts()[3] == 3
    bench.store.resolve("q")
    bench.check()
    assert bench.counts()[3] == 0


def test_an_acquire_of_no_tokens_is_refused() -> None:
    assert refusal(Bench().acquire("p", [], growth=4)) is Problem.INVALID


def test_a_lease_that_has_to_give_way_ends_with_its_handoff() -> None:
    bench = Bench(4)
    young = bench.granted("p", list(range(16)), arrival_s=5.0, joiner="decode-0")
    assert bench.acquire("q", A, arrival_s=1.0) is None
    assert bench.store.instructions() == [Reclaim("p", young.lease_id)]
    bench.store.hand_off("p", young.lease_id, 0.0, "d")
    bench.check()
    assert [(type(item), item.session) for item in bench.store.instructions()] == [(Reply, "q")]
    assert refusal(bench.store.join("d", "decode-0", young.lease_id)) is Problem.UNKNOWN


def test_a_joiner_that_joins_a_lease_in_reclaim_is_asked_too() -> None:
    bench = Bench(4)
    young = bench.granted("p", list(range(16)), arrival_s=5.0, joiner="decode-0")
    assert bench.acquire("q", A, arrival_s=1.0) is None
    bench.store.instructions()
    assert isinstance(bench.store.join("d", "decode-0", young.lease_id), Granted)
    assert bench.store.instructions() == [Reclaim("d", young.lease_id)]


def test_without_a_joiner_a_handoff_ends_the_lease() -> None:
    bench = Bench()
    lease = bench.granted("p", A)
    bench.store.hand_off("p", lease.lease_id, 0.0)
    bench.check()
    assert bench.counts() == (16, 0, 0, 0)


def test_a_joiner_may_use_the_table_it_got_until_the_lease_ends() -> None:
    """Another holder's duplicate seal changes the table, and the joiner does not hear of it."""
    bench = Bench()
    lease, twin = bench.granted("p", A, joiner="decode-0"), bench.granted("q", A)
    joined = bench.store.join("d", "decode-0", lease.lease_id)
    assert isinstance(joined, Granted)
    bench.seal("q", twin.lease_id, A)
    assert bench.store.refresh("p", lease.lease_id, 0) == Changed([], 0)
    changed = bench.seal("p", lease.lease_id, A)
    assert isinstance(changed, Changed)
    assert len(changed.changes) == 2
    bench.store.hand_off("p", lease.lease_id, 0.0, "d")
    bench.check()
    assert bench.store.pool.free_slots().isdisjoint(joined.slots)
    bench.release("d", lease.lease_id)
    bench.release("q", twin.lease_id)
    assert bench.counts() == (14, 0, 2, 0)


def test_an_extension_does_not_outlive_the_hold_on_its_lease() -> None:
    bench = Bench(5)
    bench.granted("o", list(range(50, 58)), arrival_s=1.0)
    lease = bench.granted("p", list(range(8)), arrival_s=2.0, joiner="decode-0")
    young = bench.granted("y", [1], arrival_s=9.0)
    assert bench.store.extend("p", 7, lease.lease_id, blocks=1, deadline_s=99.0) is None
    bench.store.hand_off("p", lease.lease_id, 0.0)
    replies = [item for item in bench.store.instructions() if isinstance(item, Reply)]
    assert [refusal(reply.result) for reply in replies] == [Problem.CANCELLED]
    bench.store.tick(11.0)
    bench.release("y", young.lease_id)
    assert bench.store.instructions() == []
    assert bench.counts() == (3, 2, 0, 0)


def test_a_reclaim_is_repeated_while_somebody_waits() -> None:
    """It may have met a lease that was passed on and that its worker had not begun to use."""
    bench = Bench(4)
    young = bench.granted("p", list(range(16)), arrival_s=5.0, joiner="decode-0")
    bench.store.hand_off("p", young.lease_id, 0.0, "d")
    assert bench.acquire("q", A, arrival_s=1.0) is None
    offered, asked = bench.store.instructions()
    assert isinstance(offered, Offer)
    assert asked == Reclaim("d", young.lease_id)
    bench.store.tick(1.0)
    assert bench.store.instructions() == [asked]
    bench.release("d", young.lease_id)
    bench.store.instructions()
    bench.store.tick(2.0)
    assert bench.store.instructions() == []


def test_a_block_is_announced_as_long_as_slab_or_tier_has_it() -> None:
    bench = Bench(slots=3)
    events, (first, second) = bench.store.events, keys([1] * 8)

    def told() -> list[tuple[bytes, bool]]:
        new = [(key, event.removed) for event in events.since(told_upto[0]) or [] for key in event.keys]
        told_upto[0] = events.last
        return new

    told_upto = [0]
    bench.cached([1] * 8)
    assert told() == [(first, False), (second, False)]
    bench.store.below_changed([second], [])
    assert told() == []
    # Both leave the slab; the tier has one of them.
    bench.granted("p", [2] * 12)
    assert told() == [(first, True)]
    assert bench.store.snapshot() == [second]
    bench.store.below_changed([], [second, first])
    assert told() == [(second, True)]
    bench.store.below_changed([first], [])
    assert told() == [(first, False)]


def test_what_a_tier_has_is_not_announced_again_when_it_comes_back() -> None:
    bench = Bench()
    bench.store.below_changed(keys([1] * 4), [])
    last = bench.store.events.last
    bench.cached([1] * 4)
    assert bench.store.events.last == last
    bench.store.below_changed([], keys([1] * 4))
    assert bench.store.events.last == last
