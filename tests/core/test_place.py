"""Placement: what is refused, what costs least, and that hints are followed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.place import Ask, Option, Role, Why, WorkerLoad, place
from headway.core.predict import Predictor

SLOW = Predictor((0.0, 1e-3, 0.0), (0.01, 0.001, 0.0))


def worker(worker_id: str, **fields: Any) -> WorkerLoad:
    """ "p…" prefill, "d…" decode, "m…" mixed, ready on node "n"."""
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[worker_id[0]]
    known = {"node": "n", "role": role, "ready": True, "free_slots": 100, "total_slots": 100, "predictor": SLOW}
    return WorkerLoad(worker_id, **{**known, **fields})


def ask(**fields: Any) -> Ask:
    known: dict[str, Any] = {
        "prompt_tokens": 100,
        "max_tokens": 120,
        "block_size": 16,
        "overlap": {},
        "local_prefill_tokens": 20,
        "max_queued": 10,
    }
    return Ask(**{**known, **fields})


def pick(options: list[Option]) -> tuple[str | None, str]:
    assert not options[0].refused, options
    return options[0].prefill_worker, options[0].decode_worker


def reason(option: Option) -> str:
    return option.refused.sentence if option.refused else ""


def test_the_least_loaded_workers_are_picked() -> None:
    workers = [worker("p0", queued_sequences=1, queued_tokens=500), worker("p1"), worker("d0", running=5), worker("d1")]
    options = place(ask(), workers)
    assert pick(options) == ("p1", "d1")
    assert options[0].wait_s == 0.0
    assert options[0].compute_s == pytest.approx(0.1)
    assert next(o for o in options if o.prefill_worker == "p0").wait_s == pytest.approx(0.5)


def test_overlap_counts_against_waiting() -> None:
    near = worker("p0", node="a", queued_sequences=1, queued_tokens=50)
    workers = [near, worker("d0", node="a"), worker("p1", node="b"), worker("d1", node="b")]
    slow = ask(overlap={"a": 64}, pull_token_s=1.0)
    assert pick(place(slow, workers)) == ("p0", "d0")
    near.queued_tokens = 70
    assert pick(place(slow, workers)) == ("p1", "d1")


def test_overlap_covers_at_most_the_prompt_but_one() -> None:
    options = place(ask(overlap={"n": 112}), [worker("m0")])
    assert options[0].overlap_tokens == 99
    assert options[0].compute_s == pytest.approx(1e-3)


def test_decode_goes_to_another_node_where_it_starts_sooner() -> None:
    here, there = worker("d0", node="a"), worker("d1", node="b")
    workers = [worker("p0", node="a"), here, there]
    over_the_wire = ask(pull_latency_s=0.005, pull_token_s=50e-6)
    assert pick(place(over_the_wire, workers)) == ("p0", "d0")
    here.running = 1
    assert pick(place(over_the_wire, workers)) == ("p0", "d1")
    assert pick(place(ask(pull_latency_s=0.1), workers)) == ("p0", "d0")
    assert pick(place(ask(pull_latency_s=0.1), [workers[0], there])) == ("p0", "d1")


def test_a_prefix_is_fetched_where_that_is_sooner_than_computing_it() -> None:
    workers = [worker("p0", node="a", queued_sequences=1, queued_tokens=500), worker("p1", node="b"), worker("d0")]
    fetched, *_ = place(ask(overlap={"a": 64}, pull_latency_s=0.01, pull_token_s=50e-6), workers)
    assert (fetched.prefill_worker, fetched.pull_from, fetched.overlap_tokens) == ("p1", "a", 64)
    assert fetched.pull_s == pytest.approx(0.01 + 64 * 50e-6)
    assert fetched.cost_s == pytest.approx(fetched.pull_s + 36e-3)
    computed, *_ = place(ask(overlap={"a": 64}, pull_latency_s=0.1), workers)
    assert (computed.prefill_worker, computed.pull_from, computed.overlap_tokens) == ("p1", None, 0)


def test_fetching_costs_nothing_while_the_prompt_queues() -> None:
    workers = [worker("p1", node="b", queued_sequences=1, queued_tokens=300), worker("d0")]
    option, *_ = place(ask(overlap={"a": 64}, pull_latency_s=0.1), workers)
    assert option.pull_from == "a"
    assert option.cost_s == pytest.approx(0.3 + 36e-3)


def test_decode_computes_little_by_itself() -> None:
    workers = [worker("p0", queued_sequences=1, queued_tokens=500), worker("d0")]
    assert pick(place(ask(overlap={"n": 80}), workers)) == (None, "d0")
    assert pick(place(ask(overlap={"n": 64}), workers)) == ("p0", "d0")
    assert pick(place(ask(overlap={"n": 80}, force_apart=True), workers)) == ("p0", "d0")


@pytest.mark.parametrize("away", [{"ready": False}, {"draining": True}])
def test_decode_computes_all_when_no_prefill_worker_is_there(away: dict[str, bool]) -> None:
    workers = [worker("p0", **away), worker("d0")]
    assert pick(place(ask(), workers)) == (None, "d0")
    assert all(option.refused for option in place(ask(force_apart=True), workers))


def test_busy_prefill_workers_are_there_all_the_same() -> None:
    options = place(ask(), [worker("p0", queued_sequences=10), worker("d0")])
    assert all(option.refused for option in options)
    assert any(option.refused and option.refused.why is Why.BUSY for option in options)


def test_mixed_worker_joins_only_where_nobody_else_can() -> None:
    assert pick(place(ask(), [worker("p0", queued_sequences=1, queued_tokens=50), worker("m0")])) == (None, "m0")
    loaded = worker("m0", queued_sequences=1, queued_tokens=50)
    assert pick(place(ask(), [worker("p0"), loaded])) == ("p0", "m0")
    assert pick(place(ask(), [worker("p0"), loaded, worker("d0", running=8)])) == ("p0", "d0")


def test_excluded_workers_and_too_small_slabs_are_refused() -> None:
    workers = [worker("p0"), worker("p1"), worker("d0"), worker("d1", node="x", total_slots=6)]
    options = place(ask(excluded=frozenset({"p0"})), workers)
    refused = {option.prefill_worker or option.decode_worker: reason(option) for option in options}
    assert refused["p1"] == ""
    assert refused["p0"] == "failed this request before"
    assert refused["d1"] == "the prompt needs 7 slots, its node has 6"


def test_full_batch_is_the_last_choice() -> None:
    full = worker("d0", running=4, max_batch=4, predictor=Predictor())
    assert pick(place(ask(), [worker("p0"), full, worker("d1", running=9)])) == ("p0", "d1")
    assert pick(place(ask(), [worker("p0"), full])) == ("p0", "d0")


def test_equals_take_turns() -> None:
    workers = [worker("p0", predictor=Predictor(), sent=1), worker("p1", predictor=Predictor()), worker("d0", sent=3)]
    assert pick(place(ask(), workers))[0] == "p1"


def test_hints() -> None:
    workers = [
        worker("p0", queued_sequences=5, queued_tokens=5000),
        worker("p1"),
        worker("d0", running=9),
        worker("d1"),
    ]
    hinted = place(ask(prefill_worker="p0", decode_worker="d0"), workers)
    assert pick(hinted) == ("p0", "d0")
    assert len(hinted) == 1
    assert pick(place(ask(decode_worker="d0"), workers)) == ("p1", "d0")
    with pytest.raises(ValueError, match=r"placement.decode_worker is 'p0'.*it has d0, d1"):
        place(ask(decode_worker="p0"), workers)
    apart = place(ask(prefill_worker="p0", decode_worker="d9"), [*workers, worker("d9", node="x")])
    assert pick(apart) == ("p0", "d9")


WORKERS = st.builds(
    worker,
    st.sampled_from([kind + number for kind in "pdm" for number in "0123"]),
    node=st.sampled_from("ab"),
    ready=st.booleans(),
    draining=st.booleans(),
    queued_sequences=st.integers(0, 12),
    queued_tokens=st.integers(0, 10_000),
    running=st.integers(0, 100),
    total_slots=st.integers(0, 20),
)


@given(st.lists(WORKERS, unique_by=lambda load: load.worker_id), st.booleans(), st.integers(0, 200))
def test_the_pick_is_able_and_the_cheapest(workers: list[WorkerLoad], force_apart: bool, overlap: int) -> None:
    options = place(ask(force_apart=force_apart, overlap={"a": overlap}), workers)
    able = [option for option in options if not option.refused]
    assert options[: len(able)] == able
    known = {load.worker_id: load for load in workers}
    for option in able:
        decode = known[option.decode_worker]
        prefill = known[option.prefill_worker or option.decode_worker]
        assert prefill.ready
        assert decode.ready
        assert not prefill.draining
        assert not decode.draining
        assert option.pull_from != prefill.node
        assert decode.role is not Role.PREFILL
        assert option.cost_s >= able[0].cost_s
        assert not (force_apart and option.prefill_worker is None)
