"""What work will take, from the coefficients that a worker reports about itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Coefficients = tuple[float, float, float]
NOTHING: Coefficients = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Predictor:
    """All results are seconds: prefill a + b·new + c·new·(cached + new/2), step a + b·batch + c·kv tokens.

    The prefill formula is that of DistServe (Zhong et al., OSDI 2024) with a cached prefix; apart from a, the chunks of
    a prompt add up to the whole.
    """

    prefill: Coefficients = NOTHING
    step: Coefficients = NOTHING

    def prefill_s(self, new: int, cached: int) -> float:
        """To compute `new` tokens of a prompt whose first `cached` tokens are there."""
        a, b, c = self.prefill
        return a + b * new + c * new * (cached + new / 2) if new > 0 else 0.0

    def tokens_within(self, seconds: float, cached: int) -> float:
        """The most tokens after `cached` ones that are computed in `seconds`: prefill_s solved for `new`."""
        a, b, c = self.prefill
        left = seconds - a
        slope = b + c * cached
        if left <= 0:
            return 0.0
        if left == math.inf or (slope <= 0 and c <= 0):
            return math.inf
        # 2·left / (slope + √(slope² + 2·c·left)) is the root that stays exact where c is tiny.
        return 2 * left / (slope + math.sqrt(slope * slope + 2 * c * left))

    def step_s(self, batch: float, kv_tokens: float) -> float:
        """One decode step of `batch` sequences (on average) that hold `kv_tokens` tokens of context together."""
        a, b, c = self.step
        return a + b * batch + c * kv_tokens


def coefficients(values: Sequence[float]) -> Coefficients:
    """Three reported numbers; what is missing, negative or not finite counts as 0."""
    a, b, c = (value if 0 < value < math.inf else 0.0 for value in (*values, 0.0, 0.0, 0.0)[:3])
    return (a, b, c)
