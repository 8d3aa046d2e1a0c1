"""Who is refused, why, and when it is worth trying again."""

from __future__ import annotations

import pytest

from headway.core.ask import Why
from headway.core.backlog import Backlog, Prompt
from headway.core.filters import check_hints
from headway.core.step import StepLimits
from tests.core.placing import ask, picked, placer, reasons, weighed, why_not, worker


def test_excluded_workers_and_too_small_slabs_are_refused() -> None:
    made = placer(worker("p0"), worker("p1"), worker("d0"), worker("d1", node="x", total_slots=6))
    refused = reasons(weighed(made, ask(excluded=frozenset({"p0"}))))
    assert refused["p1"] == ""
    assert refused["p0"] == "failed this request before"
    assert refused["d1"] == "the prompt needs 7 slots, its node has 6"


def test_hints() -> None:
    made = placer(worker("p0", queued_s=5.0), worker("p1"), worker("d0", running=9), worker("d1"))
    assert picked(made, prefill_worker="p0", decode_worker="d0") == ("p0", "d0")
    assert len(weighed(made, ask(prefill_worker="p0", decode_worker="d0"))) == 1
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


def test_queues_are_bounded_in_seconds() -> None:
    made = placer(worker("p0", queued_s=2.0), worker("d0"), max_wait_s=1.5)
    assert made.place(ask(), 0.0) is None
    refused = why_not(made, "p0")
    assert refused is not None
    assert (refused.why, refused.retry_s) == (Why.BUSY, pytest.approx(0.5))


def test_what_is_best_for_others_is_left_where_only_the_other_way_is_in_time() -> None:
    interrupted = worker("p0", node="a", backlog=Backlog(StepLimits(chunk_s=0.01)))
    made = placer(interrupted, worker("d0", node="d"), latency_s=0.2, local_prefill_tokens=0)
    for number in range(10):
        made.loads["p0"].backlog.add(Prompt(number, (0, 9.0), 9.0, 9000), 0.0)
    made.loads["p0"].backlog.remove(0, 0.0)
    # Pulled it takes 0.2 s and puts little on those behind; computed 0.1 s, and puts that on each of them.
    wanted = {"resident": {"b": 90}}
    assert picked(made, **wanted) == ("p0", "d0")
    late = made.place(ask(**wanted, objective_s=5.0), 0.0)
    soon = made.place(ask(**wanted, objective_s=0.2), 0.0)
    assert late is not None
    assert soon is not None
    assert (late.pull_from, soon.pull_from) == ("b", None)
