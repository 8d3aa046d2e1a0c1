"""Single flight: a block that several leases want is fetched once."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headway.core.flights import Flights

KEYS = [bytes([at]) for at in range(6)]


def test_the_first_fetches_and_the_others_follow() -> None:
    flights = Flights()
    assert flights.want(1, KEYS) == 6
    assert flights.want(2, KEYS[:3]) == 0
    assert flights.want(3, KEYS[2:]) == 0
    assert flights.ended(1) == {2, 3}
    assert flights.want(2, KEYS[:1]) == 1


def test_fetches_up_to_what_is_coming() -> None:
    flights = Flights()
    flights.want(1, KEYS[3:])
    assert flights.want(2, KEYS) == 3


def test_a_transfer_ends_with_its_last_waiter() -> None:
    flights = Flights()
    flights.want(1, KEYS)
    flights.want(2, KEYS)
    assert flights.stop(1) is None
    assert flights.stop(2) == 1
    flights.ended(1)
    assert flights.stop(1) is None
    assert len(flights) == 0


def test_a_transfer_without_followers_ends_with_its_lease() -> None:
    flights = Flights()
    flights.want(1, KEYS)
    assert flights.stop(1) == 1


class SingleFlight(RuleBasedStateMachine):
    """A model: each lease idle, fetching a set of keys, or following."""

    def __init__(self) -> None:
        super().__init__()
        self.flights = Flights()
        self.fetching: dict[int, set[bytes]] = {}
        self.following: dict[int, int] = {}
        self.unwanted: set[int] = set()
        self.last = 0

    @rule(first=st.integers(0, 5), data=st.data())
    def want(self, first: int, data: st.DataObject) -> None:
        self.last += 1
        keys = KEYS[first : data.draw(st.integers(first + 1, 6))]
        count = self.flights.want(self.last, keys)
        coming = set().union(*self.fetching.values()) if self.fetching else set()
        if count:
            assert not coming.intersection(keys[:count])
            assert count == len(keys) or keys[count] in coming
            self.fetching[self.last] = set(keys[:count])
        else:
            (leader,) = [lease for lease, fetched in self.fetching.items() if keys[0] in fetched]
            self.following[self.last] = leader

    @precondition(lambda self: self.fetching)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.fetching)))
        del self.fetching[lease]
        self.unwanted.discard(lease)
        assert self.flights.ended(lease) == {f for f, leader in self.following.items() if leader == lease}
        self.following = {f: leader for f, leader in self.following.items() if leader != lease}

    @precondition(lambda self: self.fetching or self.following)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted({*self.fetching, *self.following})))
        leader = self.following.pop(lease, lease)
        if leader == lease:
            self.unwanted.add(lease)
        nobody = leader in self.unwanted and leader not in self.following.values()
        assert self.flights.stop(lease) == (leader if nobody else None)

    @invariant()
    def counted(self) -> None:
        assert len(self.flights) == len(self.fetching)


TestSingleFlight = SingleFlight.TestCase
