"""Timings by the number of threads: each learns by itself, and all of them outlive a restart."""

from __future__ import annotations

import json

import pytest

from headway.core.fit import ForwardWork
from headway.core.timings import Timings


def observed(timings: Timings, threads: int, token_s: float) -> None:
    for tokens in (64, 512, 1024):
        timings.use(threads).observe(ForwardWork([(tokens, 0)]), tokens * token_s)


def test_each_number_of_threads_learns_from_its_own_forwards() -> None:
    timings = Timings(4)
    assert not timings.known
    observed(timings, 4, 1e-3)
    assert timings.known
    guessed = timings.use(2)
    assert guessed is timings.now
    assert guessed.predictor.prefill_s(1000, 0) == pytest.approx(2.0, rel=1e-3)
    observed(timings, 2, 1.5e-3)
    assert timings.use(2).predictor.prefill_s(1000, 0) == pytest.approx(1.5, rel=1e-3)
    assert timings.use(4).predictor.prefill_s(1000, 0) == pytest.approx(1.0, rel=1e-3)


def test_all_of_them_are_there_after_a_restart() -> None:
    timings = Timings(4)
    observed(timings, 4, 1e-3)
    timings.now.anchor()
    observed(timings, 2, 1.5e-3)
    timings.use(1)
    again = Timings(4)
    again.restore(json.loads(json.dumps(timings.state())))
    assert again.now is again.use(4)
    for threads in (4, 2, 1):
        # Of one thread nothing was observed: it is still a guess by those of four.
        expected = timings.use(threads).predictor.prefill_s(1000, 0)
        assert again.use(threads).predictor.prefill_s(1000, 0) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["0", "-1", "two"])
def test_what_is_no_number_of_threads_is_refused_and_changes_nothing(name: str) -> None:
    timings = Timings(4)
    observed(timings, 4, 1e-3)
    before = timings.state()
    with pytest.raises(ValueError, match=r"threads|invalid literal"):
        timings.restore({**before, name: before["4"]})
    with pytest.raises(ValueError, match="no timings of 4 threads"):
        timings.restore({"2": before["4"]})
    assert timings.state() == before
