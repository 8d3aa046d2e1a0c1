"""The predictor's formulas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.predict import Predictor, coefficients, fastest

TOKENS = st.integers(0, 100_000)


def test_formulas() -> None:
    predictor = Predictor((1.0, 0.1, 0.01), (2.0, 0.5, 0.001))
    assert predictor.prefill_s(10, 100) == pytest.approx(1.0 + 1.0 + 0.01 * 10 * 105)
    assert predictor.prefill_s(0, 100) == 0.0
    assert predictor.step_s(4, 1000) == pytest.approx(2.0 + 2.0 + 1.0)
    assert predictor.queue_s(2, 20) == pytest.approx(2 * predictor.prefill_s(10, 0))
    assert predictor.queue_s(0, 0) == 0.0


def test_missing_or_negative_coefficients_are_nothing() -> None:
    assert coefficients([]) == (0.0, 0.0, 0.0)
    assert coefficients([1.0, -2.0]) == (1.0, 0.0, 0.0)


def test_equal_workers_share_the_best_that_was_measured() -> None:
    guess = Predictor((0.0, 1e-3, 0.0), (1e-2, 0.0, 0.0))
    measured = Predictor((0.0, 1e-6, 0.0), (2e-2, 0.0, 0.0))
    assert fastest([guess, measured]) == Predictor((0.0, 1e-6, 0.0), (1e-2, 0.0, 0.0))


@given(TOKENS, TOKENS)
def test_computing_less_never_takes_longer(prompt: int, cached: int) -> None:
    predictor = Predictor((0.02, 1.1e-4, 2.1e-9))
    cached = min(cached, prompt)
    assert predictor.prefill_s(prompt - cached, cached) <= predictor.prefill_s(prompt, 0) + 1e-9
