"""What work will take, from the coefficients that a worker reports about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Coefficients = tuple[float, float, float]
NOTHING: Coefficients = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Predictor:
    """All results are seconds: prefill a + b·new + c·new·(cached + new/2), step a + b·batch + c·kv tokens."""

    prefill: Coefficients = NOTHING
    step: Coefficients = NOTHING

    def prefill_s(self, new: int, cached: int) -> float:
        """To compute `new` tokens of a prompt whose first `cached` tokens are there."""
        a, b, c = self.prefill
        return a + b * new + c * new * (cached + new / 2) if new > 0 else 0.0

    def queue_s(self, sequences: int, tokens: int) -> float:
        """To compute `tokens` waiting tokens of `sequences` prompts, taken as equally long."""
        return sequences * self.prefill_s(tokens // sequences, 0) if sequences > 0 else 0.0

    def step_s(self, batch: int, kv_tokens: int) -> float:
        """One decode step of `batch` sequences that hold `kv_tokens` tokens of context together."""
        a, b, c = self.step
        return a + b * batch + c * kv_tokens


def fastest(predictors: Sequence[Predictor]) -> Predictor:
    """What equal workers can be trusted to do: the best that any of them measured, for prefill and for steps.

    A worker that has not measured yet, or only its cold start, would otherwise never get work and so never learn.
    """
    prefill = min(predictors, key=lambda predictor: predictor.prefill_s(1024, 0)).prefill
    step = min(predictors, key=lambda predictor: predictor.step_s(1, 1024)).step
    return Predictor(prefill, step)


def coefficients(values: Sequence[float]) -> Coefficients:
    """Three reported numbers; what is missing or negative counts as 0."""
    a, b, c = (max(0.0, value) for value in (*values, 0.0, 0.0, 0.0)[:3])
    return (a, b, c)
