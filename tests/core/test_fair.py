"""Tenants share a worker: a flood delays its own tenant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headway.core.fair import MOST, Fairness
from headway.core.order import Order


def served_before(flood: int, burst: int) -> float:
    """Seconds of the flood's prompts, 1 s each, that are computed before `burst` prompts of another tenant are."""
    fair, order = Fairness(), Order()
    queue = [("flood", 1.0)] * flood
    for _ in range(10):
        fair.debts({"flood"})
        fair.charge("flood", 1.0)
    queue += [("other", 1.2)] * burst
    before = 0.0
    while any(tenant == "other" for tenant, _ in queue):
        debts = fair.debts({tenant for tenant, _ in queue})
        tenant, seconds = min(queue, key=lambda item: order.key(item[1], 1, 0.0, 0, debts[item[0]]))
        queue.remove((tenant, seconds))
        fair.charge(tenant, seconds)
        before += seconds if tenant == "flood" else 0.0
    return before


def test_a_flood_delays_its_tenant_and_not_the_others() -> None:
    # Shortest first alone would compute all hundred of the flood before the other's.
    assert served_before(flood=100, burst=1) <= 1.0
    assert served_before(flood=100, burst=5) <= 6.0


def test_one_tenant_alone_has_no_debt() -> None:
    fair = Fairness()
    for _ in range(3):
        assert fair.debts({"a"}) == {}
        fair.charge("a", 5.0)


def test_nobody_saves_up_by_waiting() -> None:
    fair = Fairness()
    for _ in range(100):
        fair.debts({"busy"})
        fair.charge("busy", 1.0)
    assert fair.debts({"busy", "idle"}) == {"busy": 0.0, "idle": 0.0}


@given(st.lists(st.tuples(st.sets(st.sampled_from("abc")), st.sampled_from("abc"), st.floats(0, 10)), max_size=30))
def test_debts_are_never_negative_and_somebody_has_none(steps: list[tuple[set[str], str, float]]) -> None:
    fair = Fairness()
    for waiting, tenant, seconds in steps:
        debts = fair.debts(waiting)
        if debts:
            assert debts.keys() == waiting
            assert min(debts.values()) == 0.0
        fair.charge(tenant, seconds)


def test_tenants_are_remembered_up_to_a_number() -> None:
    fair = Fairness()
    for number in range(MOST + 500):
        fair.debts({str(number)})
        fair.charge(str(number), 1.0)
    assert len(fair._served) <= MOST + 1
    crowd = {str(number) for number in range(2 * MOST)}
    assert fair.debts(crowd).keys() == crowd
