"""Placement: what costs least, cached and promised prefixes, pulls, and delays of others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.ask import Promised
from headway.core.backlog import Prompt
from headway.core.load import Role, WorkerLoad
from headway.core.place import Placer
from headway.core.predict import Predictor
from tests.core.placing import KEYS, SLOW, ask, picked, placer, weighed, worker


def test_the_least_loaded_workers_are_picked() -> None:
    made = placer(worker("p0", queued_s=0.5), worker("p1"), worker("d0", running=5), worker("d1"))
    assert picked(made) == ("p1", "d1")
    first, second, *_ = weighed(made, ask())
    assert (first.wait_s, first.compute_s) == (0.0, pytest.approx(0.1))
    assert (second.prefill_worker, second.wait_s) == ("p0", pytest.approx(0.5))


def test_overlap_counts_against_waiting() -> None:
    def made(queued_s: float) -> Placer:
        near = worker("p0", node="a", queued_s=queued_s)
        return placer(near, worker("d0", node="a"), worker("p1", node="b"), worker("d1", node="b"), token_s=1.0)

    assert picked(made(0.05), resident={"a": 64})[0] == "p0"
    assert picked(made(0.07), resident={"a": 64})[0] == "p1"


def test_overlap_covers_at_most_the_prompt_but_one() -> None:
    option = placer(worker("m0")).place(ask(resident={"n": 112}), 0.0)
    assert option is not None
    assert option.overlap_tokens == 99
    assert option.compute_s == pytest.approx(1e-3)


def test_a_prefix_that_is_computed_now_counts_as_cached_there() -> None:
    made = placer(worker("p0", node="a", queued_s=0.03), worker("p1", node="b"), worker("d0"))
    assert picked(made, promised={"p0": Promised(64, 0.03)})[0] == "p0"
    assert picked(made, promised={"p0": Promised(64, 0.2)})[0] == "p1"
    assert picked(made)[0] == "p1"


def test_a_promise_holds_for_its_worker_and_not_for_others_of_the_node() -> None:
    made = placer(worker("p0", queued_s=0.5), worker("p1"), worker("d0"), itl_objective_s=0.01)
    sibling = ask(promised={"p0": Promised(96, 0.5)})
    options = {option.worker: option for option in weighed(made, sibling)}
    assert (options["p0"].overlap_tokens, options["p0"].ttft_s) == (96, pytest.approx(0.504))
    assert (options["p1"].overlap_tokens, options["p1"].ttft_s) == (0, pytest.approx(0.1))
    assert options["d0"].refused is not None


def test_one_that_goes_before_the_one_it_waits_for_waits_for_it_all_the_same() -> None:
    made = placer(worker("p0", queued_s=1.0), worker("d0"))
    parent = ask(keys=KEYS[:6], prompt_tokens=1000)
    option = made.place(parent, 0.0)
    assert option is not None
    made.reserve("parent", parent, option, 0.0)
    _, promised = made.overlaps(KEYS[:6])
    sibling = made.place(ask(keys=KEYS[:6], promised=promised), 0.0)
    assert sibling is not None
    assert sibling.overlap_tokens == 96
    assert sibling.ttft_s == pytest.approx(2.0 + 0.004)


def test_a_burst_of_siblings_computes_its_prefix_once() -> None:
    made = placer(worker("p0", node="a"), worker("p1", node="b"), worker("d0"), token_s=1.0)
    options = []
    for number in range(3):
        resident, promised = made.overlaps(KEYS[:5])
        sibling = ask(keys=KEYS[:5], resident=resident, promised=promised)
        option = made.place(sibling, 0.0)
        assert option is not None
        options.append(option)
        made.reserve(number, sibling, option, 0.0)
    assert options[0].overlap_tokens == 0
    # A fresh worker would take 100 ms, the one that computes the prefix 100 ms of waiting and 20 ms of computing.
    assert [option.prefill_worker for option in options] == ["p0", "p1", "p0"]
    assert options[2].overlap_tokens == 80


def test_a_prefix_is_fetched_where_that_is_sooner_than_computing_it() -> None:
    workers = [worker("p0", node="a", queued_s=0.5), worker("p1", node="b"), worker("d0")]
    option = placer(*workers, latency_s=0.01, token_s=50e-6).place(ask(resident={"a": 64}), 0.0)
    assert option is not None
    assert (option.prefill_worker, option.pull_from, option.overlap_tokens) == ("p1", "a", 64)
    assert option.pull_s == pytest.approx(0.01 + 64 * 50e-6)
    assert option.ttft_s == pytest.approx(option.pull_s + 36e-3)
    computed = placer(*workers, latency_s=0.1).place(ask(resident={"a": 64}), 0.0)
    assert computed is not None
    assert (computed.prefill_worker, computed.pull_from, computed.overlap_tokens) == ("p1", None, 0)


def test_fetching_costs_nothing_while_the_prompt_queues() -> None:
    option = placer(worker("p1", node="b", queued_s=0.3), worker("d0"), latency_s=0.1).place(
        ask(resident={"a": 64}), 0.0
    )
    assert option is not None
    assert option.pull_from == "a"
    assert option.ttft_s == pytest.approx(0.3 + 36e-3)


def test_a_pull_waits_for_those_before_it_on_its_link() -> None:
    made = placer(worker("p1", node="b"), worker("d0"), token_s=1e-4)
    wanted = ask(resident={"a": 64})
    option = made.place(wanted, 0.0)
    assert option is not None
    made.reserve("first", wanted, option, 0.0)
    later = weighed(made, wanted)[0]
    assert later.pull_s == pytest.approx(2 * option.pull_s)


def test_the_delay_of_those_behind_is_weighed() -> None:
    made = placer(worker("p0", queued_s=0.2), worker("p1", queued_s=0.25), worker("d0"))
    for number in range(3):
        made.loads["p0"].backlog.add(Prompt(number, (0, 5.0), 5.0, 5000), 0.0)
    # p0 would start it sooner, at the expense of three.
    assert picked(made) == ("p1", "d0")


def test_a_tenant_in_debt_waits_where_it_has_debts() -> None:
    made = placer(worker("p0", queued_s=0.1), worker("d0"), local_prefill_tokens=0)
    made.loads["p0"].backlog.add(Prompt("waits", (0, 0.5), 0.5, 500), 0.0)
    made.loads["p0"].backlog.settle({"flood": 3.0, "other": 0.0})
    waits = {}
    for tenant in ("flood", "other", "new"):
        option = made.place(ask(tenant=tenant), 0.0)
        assert option is not None
        waits[tenant] = option.wait_s
    assert waits == {"flood": pytest.approx(0.6), "other": pytest.approx(0.1), "new": pytest.approx(0.1)}


def test_equals_take_turns() -> None:
    made = placer(
        worker("p0", predictor=Predictor(), sent=1), worker("p1", predictor=Predictor()), worker("d0", sent=3)
    )
    assert picked(made)[0] == "p1"


def test_a_worker_that_got_nothing_yet_is_tried_though_it_looks_slower() -> None:
    def made(times: float, sent: int) -> Placer:
        other = worker("p1", predictor=Predictor((0.0, times * 1e-3, 0.0), SLOW.step), sent=sent)
        return placer(worker("p0", sent=5), other, worker("d0"))

    assert picked(made(1.2, 0))[0] == "p1"
    assert picked(made(1.2, 1))[0] == "p0"
    assert picked(made(1.3, 0))[0] == "p0"


def test_equal_costs_do_not_drift() -> None:
    slower = [Predictor((0.0, 1e-3 * 1.019**at, 0.0), SLOW.step) for at in range(30)]
    made = placer(*(worker(f"p{at}", predictor=p, sent=31 - at) for at, p in enumerate(slower)), worker("d0"))
    option = made.place(ask(), 0.0)
    assert option is not None
    assert option.compute_s <= 0.1 * 1.021


WORKERS = st.builds(
    worker,
    st.sampled_from([kind + number for kind in "pdm" for number in "0123"]),
    node=st.sampled_from("ab"),
    ready=st.booleans(),
    draining=st.booleans(),
    reported=st.integers(0, 12),
    queued_s=st.floats(0, 10),
    running=st.integers(0, 100),
    total_slots=st.integers(0, 20),
)


@given(st.lists(WORKERS, unique_by=lambda load: load.worker_id), st.booleans(), st.integers(0, 200))
def test_the_pick_is_able_and_the_cheapest(workers: list[WorkerLoad], force_apart: bool, overlap: int) -> None:
    made = placer(*workers, token_s=1e-5)
    wanted = ask(force_apart=force_apart, resident={"a": overlap})
    options = weighed(made, wanted)
    able = [option for option in options if not option.refused]
    assert options[: len(able)] == able
    best = made.place(wanted, 0.0)
    assert (best is None) == (not able)
    untried = any(not load.sent for load in workers)
    for option in able:
        decode, prefill = made.loads[option.decode_worker], made.loads[option.worker]
        assert prefill.ready
        assert decode.ready
        assert not prefill.draining
        assert not decode.draining
        assert option.pull_from != prefill.node
        assert decode.role is not Role.PREFILL
        assert best is not None
        assert option.cost_s * (1.25 if untried else 1.02) >= best.cost_s - 1e-9
        assert not (force_apart and option.prefill_worker is None)


def test_what_a_sibling_will_have_computed_is_not_there_yet_for_a_pull() -> None:
    made = placer(worker("p0", node="a"), worker("d0", node="d"), token_s=1e-5)
    wanted = ask(resident={"b": 80}, promised={"p0": Promised(48, 0.5)})
    option = made.place(wanted, 0.0)
    assert option is not None
    assert (option.pull_from, option.pull_s) == ("b", pytest.approx(80 * 1e-5))
    made.reserve("x", wanted, option, 0.0)
    assert made.planner.links.between("b", "a").free_s == pytest.approx(80 * 1e-5)
