"""The predictor's formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.predict import Predictor, coefficients

TOKENS = st.integers(0, 100_000)
STUDY = Predictor((0.02, 1.1e-4, 2.1e-9))


def test_formulas() -> None:
    predictor = Predictor((1.0, 0.1, 0.01), (2.0, 0.5, 0.001))
    assert predictor.prefill_s(10, 100) == pytest.approx(1.0 + 1.0 + 0.01 * 10 * 105)
    assert predictor.prefill_s(0, 100) == 0.0
    assert predictor.step_s(4, 1000) == pytest.approx(2.0 + 2.0 + 1.0)


def test_missing_negative_and_unreal_coefficients_are_nothing() -> None:
    assert coefficients([]) == (0.0, 0.0, 0.0)
    assert coefficients([1.0, -2.0, math.nan]) == (1.0, 0.0, 0.0)
    assert coefficients([math.inf, 2.0]) == (0.0, 2.0, 0.0)


@given(TOKENS, TOKENS)
def test_computing_less_never_takes_longer(prompt: int, cached: int) -> None:
    cached = min(cached, prompt)
    assert STUDY.prefill_s(prompt - cached, cached) <= STUDY.prefill_s(prompt, 0) + 1e-9


@given(st.integers(1, 100_000), TOKENS)
def test_tokens_within_is_the_inverse_of_prefill_s(new: int, cached: int) -> None:
    assert STUDY.tokens_within(STUDY.prefill_s(new, cached), cached) == pytest.approx(new, rel=1e-6)


def test_tokens_within_at_its_ends() -> None:
    assert STUDY.tokens_within(0.01, 0) == 0.0
    assert STUDY.tokens_within(math.inf, 0) == math.inf
    assert Predictor().tokens_within(1.0, 100) == math.inf


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), TOKENS)
def test_chunks_add_up_to_the_whole(chunks: list[int], cached: int) -> None:
    fixed_s = STUDY.prefill[0]
    whole = STUDY.prefill_s(sum(chunks), cached) - fixed_s
    parts = sum(STUDY.prefill_s(count, cached + sum(chunks[:at])) - fixed_s for at, count in enumerate(chunks))
    assert parts == pytest.approx(whole)
