"""Expected lengths of answers."""

from __future__ import annotations

from headway.core.lengths import MOST, AnswerLengths


def test_routes_are_learned_apart_and_a_new_one_starts_from_all() -> None:
    lengths = AnswerLengths()
    assert lengths.expect("x", 1000) == 256
    for _ in range(100):
        lengths.observe("short", 10)
    assert lengths.expect("short", 1000) == 10
    assert lengths.expect("new", 1000) == 10
    for _ in range(100):
        lengths.observe("long", 900)
    assert lengths.expect("long", 1000) == 900
    assert lengths.expect("long", 50) == 50
    assert lengths.expect("short", 1000) == 10


def test_routes_are_bounded() -> None:
    lengths = AnswerLengths()
    for number in range(MOST + 10):
        lengths.observe(number, 5)
    assert len(lengths._routes) == MOST
