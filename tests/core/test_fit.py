"""What forwards took becomes a predictor: by least relative squares, whatever a few of them say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.fit import Fit, ForwardWork, Timing
from headway.core.predict import Predictor

TRUE = Predictor((0.02, 1.1e-4, 2.1e-9), (0.015, 1e-4, 2e-8))


def observed(timing: Timing, count: int, noise: float = 0.0, outliers: float = 0.0) -> Timing:
    draw = random.Random(1)

    def off() -> float:
        return draw.lognormvariate(0, noise) * (20 if draw.random() < outliers else 1)

    for _ in range(count):
        new, cached = int(draw.lognormvariate(7, 1.2)) + 1, draw.choice([0, 0, 4096, 60_000])
        batch = draw.randint(1, 60)
        kv_tokens = batch * draw.randint(500, 9000)
        timing.observe(ForwardWork([(new, cached)]), TRUE.prefill_s(new, cached) * off())
        timing.observe(ForwardWork((), batch, kv_tokens), TRUE.step_s(batch, kv_tokens) * off())
    return timing


def test_exact_observations_give_the_exact_coefficients() -> None:
    timing = observed(Timing(), 50)
    assert timing.predictor.prefill == pytest.approx(TRUE.prefill, rel=1e-2)
    assert timing.predictor.step == pytest.approx(TRUE.step, rel=1e-2)
    assert timing.prefill.error < 0.05


def test_noise_and_outliers_are_averaged_out_and_show_in_the_error() -> None:
    timing = observed(Timing(), 400, noise=0.1, outliers=0.03)
    for new, cached in ((100, 0), (2000, 0), (500, 60_000)):
        assert timing.predictor.prefill_s(new, cached) == pytest.approx(TRUE.prefill_s(new, cached), rel=0.15)
    assert timing.predictor.step_s(32, 100_000) == pytest.approx(TRUE.step_s(32, 100_000), rel=0.15)
    assert 0.02 < timing.prefill.error < 1.0


def test_a_worker_that_became_twice_as_slow_is_followed() -> None:
    timing = observed(Timing(), 400)
    for _ in range(600):
        timing.observe(ForwardWork([(1000, 0)]), 2 * TRUE.prefill_s(1000, 0))
    assert timing.predictor.prefill_s(1000, 0) == pytest.approx(2 * TRUE.prefill_s(1000, 0), rel=0.1)


SLOW = Predictor((0.04, 6e-4, 1e-6))


def test_who_computes_short_prompts_for_long_still_knows_what_a_long_one_takes() -> None:
    """Of short prompts of one length alone nobody can tell what each of the coefficients is."""
    timing, draw = Timing(), random.Random(1)
    for new in (32, 128, 512, 1024):
        timing.observe(ForwardWork([(new, 0)]), SLOW.prefill_s(new, 0))
    timing.anchor()
    for _ in range(3000):
        timing.observe(ForwardWork([(64, 0)]), SLOW.prefill_s(64, 0) * draw.lognormvariate(0, 0.1))
    assert timing.predictor.prefill_s(64, 0) == pytest.approx(SLOW.prefill_s(64, 0), rel=0.05)
    assert timing.predictor.prefill_s(1500, 0) == pytest.approx(SLOW.prefill_s(1500, 0), rel=0.25)
    # Nor after a restart, or where another number of threads begins late.
    again = Timing()
    again.restore(timing.state())
    half = timing.times(2.0)
    for late, factor in ((again, 1.0), (half, 2.0)):
        for _ in range(500):
            late.observe(ForwardWork([(64, 0)]), factor * SLOW.prefill_s(64, 0) * draw.lognormvariate(0, 0.1))
        expected = factor * SLOW.prefill_s(1500, 0)
        assert late.predictor.prefill_s(1500, 0) == pytest.approx(expected, rel=0.25)


def test_what_is_known_of_some_threads_is_where_others_start() -> None:
    timing, draw = Timing(), random.Random(1)
    for new in (32, 128, 512, 1024):
        timing.observe(ForwardWork([(new, 0)]), SLOW.prefill_s(new, 0))
    timing.anchor()
    half = timing.times(2.0)
    assert half.predictor.prefill_s(1500, 0) == pytest.approx(2 * SLOW.prefill_s(1500, 0), rel=1e-6)
    assert half.prefill_token_s == 0.0
    for _ in range(3000):
        half.observe(ForwardWork([(64, 0)]), 1.7 * SLOW.prefill_s(64, 0) * draw.lognormvariate(0, 0.1))
    assert half.predictor.prefill_s(64, 0) == pytest.approx(1.7 * SLOW.prefill_s(64, 0), rel=0.05)
    assert half.predictor.prefill_s(1500, 0) == pytest.approx(1.85 * SLOW.prefill_s(1500, 0), rel=0.25)


def test_one_observation_replaces_the_guess() -> None:
    timing = Timing()
    assert timing.prefill_token_s == 0.0
    timing.observe(ForwardWork([(1024, 0)]), 0.2)
    assert timing.predictor.prefill_s(1024, 0) == pytest.approx(0.2, rel=1e-3)
    assert timing.prefill_token_s == pytest.approx(0.2 / 1024, rel=1e-3)


def test_prompts_beside_steps_count_without_what_the_steps_take() -> None:
    timing = observed(Timing(), 50)
    for _ in range(100):
        seconds = TRUE.prefill_s(300, 0) + TRUE.step_s(8, 8000)
        timing.observe(ForwardWork([(300, 0)], 8, 8000), seconds)
    assert timing.predictor.prefill_s(300, 0) == pytest.approx(TRUE.prefill_s(300, 0), rel=0.02)


def test_prompts_beside_steps_say_nothing_while_steps_are_not_known() -> None:
    timing = Timing()
    timing.observe(ForwardWork([(300, 0)], 8, 8000), 1.0)
    assert timing.prefill.count == 0


def test_a_restart_goes_on_where_it_was() -> None:
    timing = observed(Timing(), 100, noise=0.1)
    other = Timing()
    other.restore(timing.state())
    # The equations were solved for the last time a few observations ago.
    assert other.predictor.prefill_s(500, 100) == pytest.approx(timing.predictor.prefill_s(500, 100), rel=0.03)
    assert other.predictor.step_s(8, 8000) == pytest.approx(timing.predictor.step_s(8, 8000), rel=0.03)
    assert other.prefill.error == timing.prefill.error
    with pytest.raises(ValueError, match="21 numbers"):
        other.restore({"prefill": [1.0], "step": [1.0]})
    with pytest.raises(ValueError, match="no state"):
        other.restore({})


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e9), st.floats(1e-6, 1e3)), max_size=40))
def test_coefficients_are_never_negative(observations: list[tuple[float, float, float]]) -> None:
    fit = Fit()
    for x, y, seconds in observations:
        fit.observe((1.0, x, y), seconds)
        assert min(fit.coefficients) >= 0.0
