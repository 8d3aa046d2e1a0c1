"""What forwards took becomes a predictor."""

from __future__ import annotations

import pytest

from headway.core.timing import StepTimes


def test_the_first_measurement_replaces_the_guess_and_later_ones_move_it() -> None:
    times = StepTimes()
    times.observe(100, 0, 0.2)
    assert times.predictor.prefill_s(50, 0) == pytest.approx(0.1)
    times.observe(100, 0, 0.1)
    assert times.predictor.prefill_s(100, 0) == pytest.approx(0.18)


def test_short_prompts_and_mixed_forwards_say_nothing_of_a_token() -> None:
    times = StepTimes()
    before = times.predictor
    times.observe(3, 0, 0.2)
    times.observe(500, 4, 0.2)
    assert times.predictor == before


def test_steps_are_measured_apart() -> None:
    times = StepTimes()
    times.observe(0, 4, 0.05)
    assert times.predictor.step_s(4, 100) == pytest.approx(0.05)
