"""Who goes between two layers of a chunk: those before it in the order, and only where that is worth it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from headway.core.fair import NO_DEBTS
from headway.core.guest import Host, plan_guest
from headway.core.order import Order, Rule
from headway.core.sequence import Sequence
from headway.core.step import StepLimits, Work
from tests.core.test_step import FIXED, PREDICTOR, sequence

LIMITS = StepLimits(8, 8192, 0.5, layers=10)


def host(tokens: int = 1000, count: int = 50, **shape: float) -> Host[Sequence]:
    """A chunk at 10 ms a token since 100.0."""
    long = replace(sequence(tokens), **shape)
    return Host([Work(long, 0, count, False)], count * 0.01, 100.0)


def guests(host: Host[Sequence], *ready: Sequence, now_s: float = 100.1, within_s: float = math.inf) -> list[int]:
    """Prompt tokens of each, with no weight on age."""
    work = plan_guest(host, ready, now_s, LIMITS, PREDICTOR, Order(ageing=0.0), NO_DEBTS, within_s)
    assert all(item.draws for item in work)
    return [item.count for item in work]


def test_a_short_prompt_is_a_guest_of_a_long_one() -> None:
    assert guests(host(), sequence(20)) == [20]
    assert guests(host()) == []


def test_the_shortest_goes_first_and_alone_where_company_would_delay_it() -> None:
    assert guests(host(), sequence(20), sequence(5), sequence(10)) == [5]
    work = plan_guest(
        Host([Work(sequence(1000), 0, 500, False)], 5.5, 100.0), [sequence(20), sequence(5)], 100.1, LIMITS, FIXED,
        Order(ageing=0.0), NO_DEBTS,
    )  # fmt: skip
    assert [item.count for item in work] == [5, 20]


@pytest.mark.parametrize(("now_s", "fits"), [(100.1, 39), (100.3, 19), (100.49, 0), (101.0, 0)])
def test_it_takes_less_than_what_is_left_of_the_chunk(now_s: float, fits: int) -> None:
    for tokens in (fits, fits + 2):
        expected = [tokens] if tokens == fits and fits else []
        assert guests(host(), *([sequence(tokens)] if tokens else []), now_s=now_s) == expected


def test_even_a_block_may_be_too_much() -> None:
    assert guests(host(), sequence(8), now_s=100.45) == []


def test_what_guests_took_is_still_left_of_the_chunk() -> None:
    chunk = host()
    assert guests(chunk, sequence(30), now_s=100.4) == []
    chunk.guests_s = 0.3
    assert guests(chunk, sequence(30), now_s=100.4) == [30]


def test_it_is_computed_to_its_end_or_not_at_all() -> None:
    """Half of it would help nobody: the other half waits for the chunk's end as before."""
    assert guests(host(), sequence(300, computed=280)) == [20]
    assert guests(host(), sequence(60)) == []


def test_it_goes_before_the_host_in_the_order_of_what_is_left_of_both() -> None:
    """Of 45 tokens 30 are done: one of 20 would have gone first before, and does not any more."""
    ending = Host([Work(sequence(45), 0, 45, True)], 0.45, 100.0)
    assert guests(ending, sequence(20), now_s=100.1) == [20]
    ending = Host([Work(sequence(45), 0, 45, True), Work(sequence(900), 0, 40, False)], 0.85, 100.0)
    assert guests(ending, sequence(20), now_s=100.1) == [20]
    assert guests(ending, sequence(20), now_s=100.6) == []


def test_age_priority_and_other_orders_count_as_between_chunks() -> None:
    def planned(order: Order, late: Sequence, **shape: float) -> int:
        return len(plan_guest(host(**shape), [late], 100.1, LIMITS, PREDICTOR, order, NO_DEBTS))

    short = sequence(20, arrival_s=1000.0)
    assert planned(Order(ageing=0.001), short) == 1
    # 9.5 s are left of the host, which is a thousand seconds older: at a tenth that is a hundred.
    assert planned(Order(ageing=0.1), short) == 0
    assert planned(Order(Rule.ARRIVAL), short) == 0
    assert planned(Order(Rule.WSPT), short) == 1
    assert planned(Order(ageing=0.0), sequence(20), priority=1) == 0
    assert planned(Order(ageing=0.1), sequence(20, arrival_s=1000.0, priority=1)) == 1


def test_the_debts_of_tenants_count() -> None:
    short = replace(sequence(20), tenant="flood")
    order = Order(ageing=0.0)
    for debts, expected in (({}, 1), ({"flood": 5.0}, 1), ({"flood": 20.0}, 0), ({"flood": 20.0, "": 20.0}, 1)):
        assert len(plan_guest(host(), [short], 100.1, LIMITS, PREDICTOR, order, debts)) == expected


def test_whoever_waits_for_the_end_is_not_kept_longer_than_asked() -> None:
    """At 100.1 the host ends after 0.5 s in all, and with a guest of 0.2 s after 0.7."""
    assert guests(host(), sequence(20), within_s=0.75) == [20]
    assert guests(host(), sequence(20), within_s=0.65) == []
    assert guests(host(), sequence(20), within_s=0.1) == []


def test_a_sequence_that_decodes_is_no_guest() -> None:
    assert guests(host(), sequence(8, computed=8, outputs=1)) == []
    assert guests(host(), sequence(8, computed=8, outputs=1), sequence(20)) == [20]


def test_a_host_of_which_nothing_is_known_has_no_guests() -> None:
    assert guests(Host([Work(sequence(1000), 0, 50, False)], 0.0, 100.0), sequence(1)) == []
