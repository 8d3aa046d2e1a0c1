"""A worker's queue seen from outside: waits, who is pushed back, what the worker says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.backlog import Backlog, Prompt
from headway.core.step import StepLimits


def prompt(name: str, exec_s: float, key: float | None = None, tokens: int = 100) -> Prompt:
    return Prompt(name, (0, exec_s if key is None else key), exec_s, tokens)


def test_the_first_runs_and_those_with_smaller_keys_go_before_a_newcomer() -> None:
    backlog = Backlog()
    assert backlog.turn((0, 1.0), 10.0)[0] == 0.0
    for name, seconds in (("a", 4.0), ("b", 3.0), ("c", 1.0)):
        backlog.add(prompt(name, seconds), 10.0)
    assert backlog.turn((0, 0.5), 10.0)[0] == pytest.approx(4.0)
    assert backlog.turn((0, 2.0), 11.0)[0] == pytest.approx(3.0 + 1.0)
    assert backlog.turn((0, 3.0), 12.0)[0] == pytest.approx(2.0 + 1.0 + 3.0)
    assert [backlog.turn((0, key), 12.0)[1] for key in (0.5, 2.0, 5.0)] == [2, 1, 0]
    assert (len(backlog), backlog.tokens) == (3, 300)
    assert backlog.left_s(12.0) == pytest.approx(6.0)


def test_the_smallest_key_starts_when_the_running_one_is_done() -> None:
    backlog = Backlog()
    for name, seconds in (("a", 4.0), ("b", 3.0), ("c", 1.0)):
        backlog.add(prompt(name, seconds), 0.0)
    backlog.remove("a", 5.0)
    assert backlog.turn((0, 2.0), 5.5)[0] == pytest.approx(0.5)
    backlog.remove("c", 6.0)
    backlog.remove("b", 7.0)
    assert (len(backlog), backlog.tokens, backlog.turn((0, 9.0), 7.0)[0]) == (0, 0, 0.0)
    backlog.remove("b", 8.0)


def test_a_late_running_prompt_takes_no_less_than_no_time() -> None:
    backlog = Backlog()
    backlog.add(prompt("a", 1.0), 0.0)
    assert backlog.turn((0, 9.0), 5.0)[0] == 0.0


def test_a_shorter_one_waits_for_no_more_than_a_chunk() -> None:
    backlog = Backlog(StepLimits(chunk_s=0.5))
    backlog.add(prompt("long", 10.0), 0.0)
    assert backlog.turn((0, 1.0), 0.0)[0] == pytest.approx(0.5)
    assert backlog.turn((0, 1.0), 0.0)[1] == 1
    assert backlog.turn((0, 11.0), 0.0)[0] == pytest.approx(10.0)
    assert backlog.turn((0, 1.0), 9.8)[0] == pytest.approx(0.2)


def test_one_that_is_done_sooner_waits_for_no_more_than_a_layer() -> None:
    backlog = Backlog(StepLimits(chunk_s=0.5, layers=10))
    backlog.add(prompt("long", 10.0), 0.0)
    assert backlog.turn((0, 1.0), 0.0, 0.1) == (pytest.approx(0.05), 1)
    assert backlog.turn((0, 1.0), 0.0, 0.6) == (pytest.approx(0.5), 1), "the rest of the chunk is sooner over"
    assert backlog.turn((0, 11.0), 0.0, 0.1) == (pytest.approx(10.0), 0)
    assert backlog.turn((0, 1.0), 9.98, 0.1)[0] == pytest.approx(0.02)
    whole = Backlog(StepLimits(chunk_s=0.5))
    whole.add(prompt("long", 10.0), 0.0)
    assert whole.turn((0, 1.0), 0.0, 0.1) == (pytest.approx(0.5), 1)


def test_what_the_worker_says_corrects_the_guess_of_who_runs() -> None:
    backlog = Backlog()
    for name in ("a", "b"):
        backlog.add(prompt(name, 2.0), 0.0)
    backlog.started("b", 1.0)
    # a had a second of its two when b began.
    assert backlog.left_s(1.0) == pytest.approx(2.0 + 1.0)
    backlog.remove("b", 3.0)
    assert backlog.left_s(3.0) == pytest.approx(1.0)


def test_prompts_of_others_come_and_go_with_reports_and_own_ones_stay() -> None:
    backlog = Backlog()
    backlog.add(prompt("mine", 2.0), 0.0)
    backlog.report([prompt("theirs", 1.0)], (), "theirs", 0.5)
    assert len(backlog) == 2
    assert backlog.turn((0, 9.0), 0.5)[0] == pytest.approx(1.0 + 1.5)
    backlog.report([], (), None, 1.0)
    assert len(backlog) == 1
    assert "mine" in backlog


def test_progress_counts_and_silence_does_not_turn_back_the_clock() -> None:
    backlog = Backlog()
    backlog.add(prompt("mine", 10.0, tokens=1000), 0.0)
    backlog.report([prompt("mine", 10.0, tokens=1000)], {"mine"}, "mine", 4.0)
    assert backlog.left_s(4.0) == pytest.approx(6.0)
    backlog.report([prompt("mine", 5.0, tokens=500)], {"mine"}, "mine", 4.0)
    assert backlog.left_s(4.0) == pytest.approx(5.0)
    assert backlog.tokens == 500


def test_what_waits_for_a_pull_or_a_sibling_is_not_taken_at_the_workers_word() -> None:
    backlog = Backlog()
    backlog.add(prompt("first", 2.0, tokens=2000), 0.0)
    for number in range(9):
        backlog.add(prompt(f"sibling {number}", 0.01, tokens=10), 0.0)
    whole = [prompt(f"sibling {number}", 2.0, tokens=2000) for number in range(9)]
    backlog.report([prompt("first", 2.0, tokens=2000), *whole], {"first"}, "first", 0.05)
    assert backlog.left_s(0.05) == pytest.approx(1.95 + 0.09)
    # Once begun, the worker knows better.
    backlog.report(whole[:1], {"sibling 0"}, "sibling 0", 2.0)
    assert backlog.left_s(2.0) == pytest.approx(2.0 + 0.08, abs=0.02)


def test_a_promise_is_broken_by_one_that_pushes_it_over_its_time() -> None:
    backlog = Backlog()
    backlog.add(prompt("a", 1.0), 0.0)
    assert not backlog.breaks((0, 0.5), 9.0, 0.0)
    backlog.add(Prompt("b", (0, 1.0), 1.0, 10, due_s=2.5), 0.0)
    assert not backlog.breaks((0, 0.5), 0.4, 0.0)
    assert backlog.breaks((0, 0.5), 0.6, 0.0)
    assert not backlog.breaks((0, 1.5), 0.6, 0.0)
    assert not backlog.breaks((0, 0.5), 0.6, 2.0), "it is too late already"
    backlog.remove("b", 0.0)
    assert not backlog.breaks((0, 0.5), 0.6, 0.0)


def test_a_long_running_one_is_kept_from_being_interrupted_too_often() -> None:
    backlog = Backlog(StepLimits(chunk_s=0.1))
    backlog.add(Prompt("long", (0, 5.0), 5.0, 10, due_s=6.0), 0.0)
    backlog.add(Prompt("short", (0, 0.4), 0.4, 10), 0.0)
    assert not backlog.breaks((0, 0.5), 0.5, 0.0)
    # The short one goes before the long one's rest, too.
    assert backlog.breaks((0, 0.7), 0.7, 0.0)
    assert not backlog.breaks((0, 0.5), 0.5, 0.0, margin=0.01)
    assert backlog.breaks((0, 0.5), 0.5, 0.0, margin=0.1)
    assert not backlog.breaks((0, 6.0), 9.0, 0.0), "it comes after both"


def test_the_rest_of_the_running_one_goes_before_those_with_larger_keys() -> None:
    backlog = Backlog(StepLimits(chunk_s=0.1))
    backlog.add(prompt("runs", 1.0), 0.0)
    backlog.add(Prompt("waits", (0, 3.0), 3.0, 10, due_s=4.2), 0.0)
    assert backlog.breaks((0, 2.0), 0.5, 0.0), "after 1 s, 0.5 s and 3 s"
    assert not backlog.breaks((0, 2.0), 0.1, 0.0)


def test_a_promise_is_kept_while_it_may_still_hold() -> None:
    backlog = Backlog()
    backlog.add(prompt("a", 1.0), 0.0)
    backlog.add(Prompt("b", (0, 1.0), 1.0, 10, due_s=1.9), 0.0)
    assert backlog.breaks((0, 0.5), 0.6, 0.0, margin=0.1), "it comes after 2 s, give or take a tenth"
    assert not backlog.breaks((0, 0.5), 0.6, 0.0, margin=0.01)


def test_what_is_left_of_the_running_one_is_what_a_newcomer_has_to_beat() -> None:
    backlog = Backlog(StepLimits(chunk_s=0.1))
    backlog.add(prompt("long", 4.0), 0.0)
    assert backlog.turn((0, 2.0), 1.0) == (pytest.approx(0.1), 1)
    assert backlog.turn((0, 2.0), 3.0) == (pytest.approx(1.0), 0)
    backlog.add(prompt("short", 0.2), 3.0)
    backlog.started("short", 3.0)
    # A second is left of it, and goes before what takes longer than that.
    assert backlog.turn((0, 2.0), 3.0)[0] == pytest.approx(0.2 + 1.0)


def test_a_worker_whose_forwards_are_bounded_in_tokens_is_interrupted_after_one() -> None:
    backlog = Backlog(StepLimits(chunk_tokens=64, chunk_s=1000.0))
    backlog.add(Prompt("long", (0, 3.0), 3.0, 1500), 0.0)
    assert backlog.turn((0, 0.1), 0.5) == (pytest.approx(3.0 * 64 / 1500), 1)
    backlog.add(Prompt("short", (0, 0.1), 0.1, 60), 0.5)
    backlog.started("short", 0.6)
    assert backlog.turn((0, 0.05), 0.6) == (pytest.approx(0.1), 2), "a prompt within the bound is one piece"


def test_who_waits_for_a_pull_or_a_siblings_prefix_is_not_taken_to_start() -> None:
    backlog = Backlog()
    backlog.add(prompt("now", 1.0), 0.0)
    backlog.add(Prompt("sibling", (0, 0.1), 0.1, 10, after="first"), 0.0)
    backlog.add(Prompt("pulled", (0, 0.2), 0.2, 10, ready_s=5.0), 0.0)
    backlog.add(prompt("first", 2.0), 0.0)
    assert backlog.running is not None
    order = []
    for now_s in (1.0, 3.0, 5.0, 6.0):
        order.append(backlog.running.name)
        backlog.remove(backlog.running.name, now_s)
    assert order == ["now", "first", "sibling", "pulled"]


def test_what_is_fetched_for_a_prompt_leaves_the_worker_free_meanwhile() -> None:
    backlog = Backlog()
    backlog.add(Prompt("pulled", (0, 1.0), 1.0, 10, ready_s=2.0), 0.0)
    assert backlog.turn((0, 5.0), 1.5) == (0.0, 1), "it starts at once, and is not interrupted"
    assert backlog.left_s(1.5) == pytest.approx(1.0)
    assert backlog.turn((0, 5.0), 2.1) == (pytest.approx(0.9), 0)
    backlog.add(prompt("short", 0.8), 1.5)
    assert backlog.running is not None
    assert backlog.running.name == "short"
    # Nothing of it was computed meanwhile.
    assert backlog.left_s(1.5) == pytest.approx(1.8)
    backlog.started("short", 1.5)
    backlog.remove("short", 2.3)
    assert backlog.left_s(2.3) == pytest.approx(1.0)


def test_who_starts_while_another_is_fetched_may_break_its_promise() -> None:
    for chunk_s, breaks in ((float("inf"), True), (0.1, False)):
        backlog = Backlog(StepLimits(chunk_s=chunk_s))
        backlog.add(Prompt("pulled", (0, 1.0), 1.0, 10, due_s=2.0, ready_s=0.5), 0.0)
        assert backlog.breaks((0, 9.0), 3.0, 0.0) == breaks
        assert backlog.turn((0, 9.0), 0.0) == (0.0, int(breaks))


def test_siblings_come_right_after_the_one_whose_prefix_they_wait_for() -> None:
    backlog = Backlog()
    backlog.add(prompt("runs", 1.0), 0.0)
    backlog.add(prompt("long", 3.0), 0.0)
    backlog.add(Prompt("sibling", (0, 0.1), 0.1, 10, due_s=4.5, after="long"), 0.0)
    # It is done after 4.1 s, whatever its own key says; what goes before the long one delays it, too.
    assert backlog.breaks((0, 2.0), 0.5, 0.0)
    assert not backlog.breaks((0, 2.0), 0.3, 0.0)
    assert not backlog.breaks((0, 9.0), 5.0, 0.0)


def test_a_pull_that_comes_early_lets_its_prompt_begin() -> None:
    backlog = Backlog()
    backlog.add(Prompt("pulled", (0, 1.0), 1.0, 10, ready_s=5.0), 0.0)
    backlog.started("pulled", 1.0)
    assert backlog.turn((0, 5.0), 1.5)[0] == pytest.approx(0.5)


def test_debts_put_prompts_back_that_are_known_already() -> None:
    backlog = Backlog()
    for name, seconds, tenant in (("runs", 1.0, "flood"), ("a", 1.0, "flood"), ("b", 2.0, "other")):
        backlog.add(Prompt(name, (0, seconds), seconds, 10, tenant=tenant), 0.0)
    newcomer = (0, 1.5)
    assert backlog.turn(backlog.with_debt(newcomer, "new"), 0.0)[0] == pytest.approx(2.0)
    backlog.settle({"flood": 9.0, "other": 0.0})
    assert backlog.turn(backlog.with_debt(newcomer, "new"), 0.0)[0] == pytest.approx(1.0)
    assert backlog.turn(backlog.with_debt(newcomer, "flood"), 0.0)[0] == pytest.approx(1.0 + 1.0 + 2.0)
    backlog.remove("runs", 1.0)
    assert backlog.running is not None
    assert backlog.running.name == "b"
    backlog.settle({})
    backlog.remove("b", 2.0)
    assert backlog.left_s(2.0) == pytest.approx(1.0)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "started"]), st.integers(0, 6), st.floats(0.01, 5.0)), max_size=40
)


@given(ACTIONS)
def test_sums_stay_those_of_the_prompts_that_are_there(actions: list[tuple[str, int, float]]) -> None:
    backlog, now_s = Backlog(), 0.0
    there: dict[int, int] = {}
    for kind, name, seconds in actions:
        now_s += seconds / 10
        if kind == "add":
            backlog.add(Prompt(name, (0, seconds), seconds, name + 1), now_s)
            there[name] = name + 1
        elif kind == "remove":
            backlog.remove(name, now_s)
            there.pop(name, None)
        else:
            backlog.started(name, now_s)
        assert {item.name for item in backlog} == there.keys()
        assert backlog.tokens == sum(there.values())
        assert backlog.turn((1 << 60, 0.0), now_s)[0] == pytest.approx(backlog.left_s(now_s))
