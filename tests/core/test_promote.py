"""Reading from a tier against computing."""

from __future__ import annotations

from headway.core.promote import RETRY, ReadCost


def measured(block_s: float = 0.01, ask_s: float = 0.001) -> ReadCost:
    cost = ReadCost()
    cost.begin(16)
    cost.ended(8, 8, 8 * block_s)
    cost.ended(8, 0, ask_s)
    return cost


def test_what_is_not_measured_is_tried() -> None:
    assert ReadCost().beats(1000, 1e-9)
    assert ReadCost().may_ask(1e-9)
    assert measured().beats(1000, 0.0)
    assert measured().may_ask(0.0)


def test_the_faster_one_wins() -> None:
    cost = measured(block_s=0.01)
    assert cost.beats(10, compute_s=0.11)
    assert not cost.beats(10, compute_s=0.09)


def test_what_others_are_reading_comes_first() -> None:
    cost = measured(block_s=0.01)
    cost.begin(10)
    assert not cost.beats(10, compute_s=0.11)
    cost.ended(10, 10, 0.1)
    assert cost.beats(10, compute_s=0.11)


def test_a_question_may_cost_a_tenth_of_what_it_may_save() -> None:
    cost = measured(ask_s=0.001)
    assert cost.may_ask(compute_s=0.011)
    assert not cost.may_ask(compute_s=0.009)


def test_what_was_slow_once_is_tried_again() -> None:
    cost = measured(block_s=10.0)
    answers = [cost.beats(1, compute_s=0.1) for _ in range(2 * RETRY)]
    assert answers.count(True) == 2
    for _ in range(30):
        cost.begin(1)
        cost.ended(1, 1, 0.01)
    assert cost.block_s < 0.05
    assert cost.beats(1, compute_s=0.1)
