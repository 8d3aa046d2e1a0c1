"""Placement: what is refused, what costs least, that hints are followed, and that loads come back to nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.ask import Ask, Option, Promised, Refusal, Why
from headway.core.backlog import Prompt
from headway.core.filters import Rules, check_hints
from headway.core.index import PrefixIndex
from headway.core.keys import join_keys
from headway.core.links import Links
from headway.core.load import Role, Share, WorkerLoad
from headway.core.place import Placer
from headway.core.policy import LeastDelay, Planner
from headway.core.predict import Predictor

SLOW = Predictor((0.0, 1e-3, 0.0), (0.01, 0.001, 0.0))
KEYS = [bytes([at]) * 16 for at in range(64)]


def worker(worker_id: str, *, queued_s: float = 0.0, running: int = 0, **fields: Any) -> WorkerLoad:
    """ "p…" prefill, "d…" decode, "m…" mixed, ready on node "n"; `queued_s`: of one prompt that it computes."""
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[worker_id[0]]
    known = {"node": "n", "role": role, "ready": True, "total_slots": 100, "predictor": SLOW}
    load = WorkerLoad(worker_id, **{**known, **fields})
    load.others_are(Share(running))
    if queued_s:
        load.backlog.add(Prompt("before", (0, 0.0), queued_s, 1), 0.0)
    return load


def placer(*workers: WorkerLoad, latency_s: float = 0.0, token_s: float = 0.0, **rules: Any) -> Placer:
    """A KV token is one byte, so that `token_s` is what a link takes for it."""
    links = Links(latency_s, 1 / token_s if token_s else 1e12)
    planner = Planner(links, token_bytes=1)
    made = Placer(
        Rules(**{"block_size": 16, "local_prefill_tokens": 20, "max_queued": 10, **rules}),
        LeastDelay(planner),
        planner,
        PrefixIndex(1000),
    )
    for load in workers:
        made.add(load)
    return made


def ask(**fields: Any) -> Ask:
    return Ask(**{"prompt_tokens": 100, **fields})


def picked(made: Placer, **fields: Any) -> tuple[str | None, str]:
    option = made.place(ask(**fields), 0.0)
    assert option is not None, made.options(ask(**fields), 0.0)
    return option.prefill_worker, option.decode_worker


def reasons(options: list[Option]) -> dict[str, str]:
    return {option.worker: option.refused.sentence if option.refused else "" for option in options}


def why_not(made: Placer, worker_id: str, **fields: Any) -> Refusal | None:
    return next(option.refused for option in made.options(ask(**fields), 0.0) if option.worker == worker_id)


def test_the_least_loaded_workers_are_picked() -> None:
    made = placer(worker("p0", queued_s=0.5), worker("p1"), worker("d0", running=5), worker("d1"))
    assert picked(made) == ("p1", "d1")
    first, second, *_ = made.options(ask(), 0.0)
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
    options = {option.worker: option for option in made.options(sibling, 0.0)}
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
    later = made.options(wanted, 0.0)[0]
    assert later.pull_s == pytest.approx(2 * option.pull_s)


def test_the_delay_of_those_behind_is_weighed() -> None:
    made = placer(worker("p0", queued_s=0.2), worker("p1", queued_s=0.25), worker("d0"))
    for number in range(3):
        made.loads["p0"].backlog.add(Prompt(number, (0, 5.0), 5.0, 5000), 0.0)
    # p0 would start it sooner, at the expense of three.
    assert picked(made) == ("p1", "d0")


def test_decode_computes_little_by_itself() -> None:
    made = placer(worker("p0", queued_s=0.5), worker("d0"))
    assert picked(made, resident={"n": 80}) == (None, "d0")
    assert picked(made, resident={"n": 64}) == ("p0", "d0")
    assert picked(made, resident={"n": 80}, force_apart=True) == ("p0", "d0")


def test_a_tenant_in_debt_waits_where_it_has_debts() -> None:
    made = placer(worker("p0", queued_s=0.1), worker("d0"), local_prefill_tokens=0)
    made.loads["p0"].backlog.add(Prompt("waits", (0, 0.5), 0.5, 500), 0.0)
    made.loads["p0"].debts = {"flood": 3.0, "other": 0.0}
    waits = {}
    for tenant in ("flood", "other", "new"):
        option = made.place(ask(tenant=tenant), 0.0)
        assert option is not None
        waits[tenant] = option.wait_s
    assert waits == {"flood": pytest.approx(0.6), "other": pytest.approx(0.1), "new": pytest.approx(0.1)}


def test_decode_computes_nothing_that_breaks_its_pace() -> None:
    made = placer(worker("p0", queued_s=5.0), worker("d0", running=4), itl_objective_s=0.03)
    assert picked(made, resident={"n": 80}) == ("p0", "d0")
    assert "the objective is 30 ms" in reasons(made.options(ask(resident={"n": 80}), 0.0))["d0"]
    made = placer(worker("p0", queued_s=5.0), worker("d0", running=4), itl_objective_s=0.04)
    assert picked(made, resident={"n": 80}) == (None, "d0")


def test_prompts_that_a_decode_worker_has_already_count_against_its_pace() -> None:
    made = placer(worker("p0", queued_s=5.0), worker("d0", running=4), itl_objective_s=0.04)
    option = made.place(ask(prompt_tokens=15), 0.0)
    assert option is not None
    assert option.worker == "d0"
    made.reserve("first", ask(prompt_tokens=15), option, 0.0)
    assert picked(made, prompt_tokens=15) == ("p0", "d0")


def test_a_prompt_at_a_decode_worker_shares_its_steps() -> None:
    busy = placer(worker("d0", running=4, shared_chunk_s=0.01)).place(ask(), 0.0)
    assert busy is not None
    # 100 ms in ten chunks, each beside a step of 14 ms.
    assert busy.compute_s == pytest.approx(0.1 + 10 * 0.014)


@pytest.mark.parametrize("away", [{"ready": False}, {"draining": True}])
def test_decode_computes_all_when_no_prefill_worker_is_there(away: dict[str, bool]) -> None:
    made = placer(worker("p0", **away), worker("d0"))
    assert picked(made) == (None, "d0")
    assert made.place(ask(force_apart=True), 0.0) is None


def test_busy_prefill_workers_are_there_all_the_same() -> None:
    made = placer(worker("p0", reported=10), worker("d0"))
    assert made.place(ask(), 0.0) is None
    assert any(option.refused and option.refused.why is Why.BUSY for option in made.options(ask(), 0.0))


def test_mixed_worker_joins_only_where_nobody_else_can() -> None:
    assert picked(placer(worker("p0", queued_s=0.05), worker("m0"))) == (None, "m0")
    loaded = worker("m0", queued_s=0.05)
    assert picked(placer(worker("p0"), loaded)) == ("p0", "m0")
    assert picked(placer(worker("p0"), loaded, worker("d0", running=8))) == ("p0", "d0")


def test_decode_goes_to_another_node_where_its_pace_is_better() -> None:
    def made(latency_s: float, here: int) -> Placer:
        workers = [worker("p0", node="a"), worker("d0", node="a", running=here), worker("d1", node="b")]
        return placer(*workers, latency_s=latency_s)

    assert picked(made(0.005, 0)) == ("p0", "d0")
    assert picked(made(0.005, 1)) == ("p0", "d1")
    assert picked(made(0.5, 1)) == ("p0", "d0")


def test_a_decode_worker_without_room_for_the_answer_is_the_last_choice() -> None:
    roomy, tight = worker("d0", running=9), worker("d1", node="b", total_slots=10)
    tight.others_are(Share(0, 50))
    assert picked(placer(worker("p0"), roomy, tight), expected_tokens=20) == ("p0", "d0")
    tight.others_are(Share(0, 20))
    assert picked(placer(worker("p0"), roomy, tight), expected_tokens=20) == ("p0", "d1")


def test_full_batch_is_the_last_choice() -> None:
    full = worker("d0", running=4, max_batch=4, predictor=Predictor())
    assert picked(placer(worker("p0"), full, worker("d1", running=9))) == ("p0", "d1")
    assert picked(placer(worker("p0"), full)) == ("p0", "d0")


def test_excluded_workers_and_too_small_slabs_are_refused() -> None:
    made = placer(worker("p0"), worker("p1"), worker("d0"), worker("d1", node="x", total_slots=6))
    refused = reasons(made.options(ask(excluded=frozenset({"p0"})), 0.0))
    assert refused["p1"] == ""
    assert refused["p0"] == "failed this request before"
    assert refused["d1"] == "the prompt needs 7 slots, its node has 6"


def test_equals_take_turns() -> None:
    made = placer(
        worker("p0", predictor=Predictor(), sent=1), worker("p1", predictor=Predictor()), worker("d0", sent=3)
    )
    assert picked(made)[0] == "p1"


def test_hints() -> None:
    made = placer(worker("p0", queued_s=5.0), worker("p1"), worker("d0", running=9), worker("d1"))
    assert picked(made, prefill_worker="p0", decode_worker="d0") == ("p0", "d0")
    assert len(made.options(ask(prefill_worker="p0", decode_worker="d0"), 0.0)) == 1
    assert picked(made, decode_worker="d0") == ("p1", "d0")
    with pytest.raises(ValueError, match=r"placement.decode_worker is 'p0'.*it has d0, d1"):
        check_hints(ask(decode_worker="p0"), made.loads)


def test_an_objective_that_cannot_be_met_is_refused_with_a_time_to_try_again() -> None:
    made = placer(worker("p0", queued_s=2.0), worker("d0"))
    assert made.place(ask(objective_s=2.6), 0.0) is not None
    assert made.place(ask(objective_s=1.5), 0.0) is None
    refused = why_not(made, "p0", objective_s=1.5)
    assert refused is not None
    assert refused.why is Why.LATE
    assert refused.retry_s == pytest.approx(0.6)


def test_what_is_soonest_is_taken_where_what_is_best_for_all_is_too_late() -> None:
    made = placer(worker("p0", queued_s=0.2), worker("p1", queued_s=0.4), worker("d0"))
    for number in range(3):
        made.loads["p0"].backlog.add(Prompt(number, (0, 5.0), 5.0, 5000), 0.0)
    assert picked(made, objective_s=0.6) == ("p1", "d0")
    assert picked(made, objective_s=0.37) == ("p0", "d0")


def test_an_objective_does_not_break_the_pace_of_those_that_decode() -> None:
    made = placer(worker("p0", queued_s=0.9), worker("d0", running=40), itl_objective_s=0.03, local_prefill_tokens=1000)
    assert picked(made, objective_s=5.0) == ("p0", "d0")
    assert made.place(ask(objective_s=0.5), 0.0) is None


def test_what_was_promised_is_not_broken_by_a_shorter_one() -> None:
    made = placer(worker("p0", queued_s=1.0), worker("d0"))
    long = ask(prompt_tokens=1000, objective_s=2.55)
    option = made.place(long, 0.0)
    assert option is not None
    made.reserve("long", long, option, 0.0)
    # It goes before the long one: 100 ms are to spare, 300 are not. One that promises nothing is free to go.
    assert made.place(ask(objective_s=5.0), 0.0) is not None
    assert made.place(ask(prompt_tokens=400, objective_s=5.0), 0.0) is None
    assert made.place(ask(prompt_tokens=400), 0.0) is not None
    refused = why_not(made, "p0", prompt_tokens=400, objective_s=5.0)
    assert refused is not None
    assert "promised" in refused.sentence
    # What cannot be kept any more keeps nobody out.
    assert made.place(ask(prompt_tokens=400, objective_s=5.0), 2.0) is not None


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
    assert (load.running, load.coming) == (1, 0)
    reservation.leave(2.0)
    assert (load.running, load.kv_tokens, load.memory.committed_tokens) == (0, 0, 0)


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


def test_those_to_come_count_for_decode_and_not_against_computing_there() -> None:
    decode = worker("d0")
    for _ in range(60):
        decode.join(100, 20)
    made = placer(worker("p0", queued_s=5.0), decode, worker("d1", running=3), itl_objective_s=0.05)
    assert picked(made, resident={"n": 80}) == (None, "d0")
    assert picked(made, force_apart=True) == ("p0", "d1")


def test_queues_are_bounded_in_seconds() -> None:
    made = placer(worker("p0", queued_s=2.0), worker("d0"), max_wait_s=1.5)
    assert made.place(ask(), 0.0) is None
    refused = why_not(made, "p0")
    assert refused is not None
    assert (refused.why, refused.retry_s) == (Why.BUSY, pytest.approx(0.5))


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
    options = made.options(wanted, 0.0)
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
    assert made.promises.overlap(KEYS) == {}
