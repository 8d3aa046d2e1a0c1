"""What placed requests add to the loads of workers, and that it goes again."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from headway.core.backlog import Prompt
from headway.core.keys import join_keys
from tests.core.placing import KEYS, ask, placer, worker


def test_what_a_gone_worker_had_does_not_count_at_its_node_any_more() -> None:
    made = placer(worker("p0"), worker("d0"), worker("d1"))
    memory = made.loads["d1"].memory
    assert memory is made.loads["d0"].memory is made.loads["p0"].memory
    gone = made.loads["d0"]
    wanted = ask(expected_tokens=50, decode_worker="d0")
    option = made.place(wanted, 0.0)
    assert option is not None
    reservation = made.reserve("x", wanted, option, 0.0)
    assert memory.committed_tokens == 150
    made.remove(gone)
    new = worker("d0")
    made.add(new)
    assert memory.committed_tokens == 0
    reservation.leave(1.0)
    assert (memory.committed_tokens, new.running, new.coming) == (0, 0, 0)
    assert (gone.running, gone.coming, gone.kv_tokens, gone.committed_tokens) == (0, 0, 0, 0)


def test_a_word_of_the_worker_that_is_older_than_its_result_changes_nothing() -> None:
    made = placer(worker("d0"))
    wanted = ask(expected_tokens=50)
    option = made.place(wanted, 0.0)
    assert option is not None
    reservation = made.reserve("x", wanted, option, 0.0)
    reservation.computed(1.0)
    load = made.loads["d0"]
    load.backlog.report([Prompt("x", (0, 0.1), 0.1, 100)], (), "x", 1.0)
    reservation.computed(1.1)
    assert (load.running, load.coming, load.in_flight) == (1, 0, 1)
    reservation.leave(2.0)
    assert load.in_flight == 0
    assert (load.running, load.kv_tokens, load.memory.committed_tokens) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["place", "computed", "leave"])), max_size=60))
def test_loads_come_back_to_nothing_whatever_the_order_of_events(events: list[tuple[int, str]]) -> None:
    made = placer(worker("p0", node="a"), worker("p1", node="b"), worker("d0"), worker("d1"))
    made.index.stored("a", join_keys(KEYS[:2]))
    reservations: dict[int, Any] = {}
    for number, kind in events:
        if kind == "place" and number not in reservations:
            resident, promised = made.overlaps(KEYS[:6])
            wanted = ask(keys=KEYS[:6], resident=resident, promised=promised, expected_tokens=number)
            option = made.place(wanted, 0.0)
            if option is not None:
                reservations[number] = made.reserve(number, wanted, option, 0.0)
        elif number in reservations and kind == "computed":
            reservations[number].computed(0.0)
        elif number in reservations:
            reservations[number].leave(0.0)
            reservations.pop(number).leave(0.0)
    for reservation in reservations.values():
        reservation.leave(0.0)
    for load in made.loads.values():
        assert (len(load.backlog), load.backlog.tokens, load.running, load.memory.committed_tokens) == (0, 0, 0, 0)
        assert load.in_flight == 0
    assert made.promises.overlap(KEYS) == {}
