"""What forwards took, as the coefficients that predictions use."""

from __future__ import annotations

WEIGHT = 0.2


class StepTimes:
    """Running averages (exponential, weight 0.2) of seconds per prefilled token and per decode step.

    Starts from a guess that only has to order work until the first forwards are measured.
    """

    def __init__(self, prefill_token_s: float = 1e-3, step_s: float = 1e-2) -> None:
        self._prefill_token_s = prefill_token_s
        self._step_s = step_s
        self._measured_prefill = self._measured_step = False

    def observe(self, prefill_tokens: int, decoding: int, seconds: float) -> None:
        """One forward of `prefill_tokens` prompt tokens and `decoding` decode steps took `seconds`."""
        if prefill_tokens and not decoding:
            weight = WEIGHT if self._measured_prefill else 1.0
            self._prefill_token_s += weight * (seconds / prefill_tokens - self._prefill_token_s)
            self._measured_prefill = True
        elif decoding and not prefill_tokens:
            weight = WEIGHT if self._measured_step else 1.0
            self._step_s += weight * (seconds - self._step_s)
            self._measured_step = True

    def prefill_seconds(self, new: int, cached: int) -> float:
        """Predicted seconds to compute `new` tokens; linear in new, so `cached` does not count yet."""
        return self._prefill_token_s * new

    @property
    def prefill_coefficients(self) -> tuple[float, float, float]:
        """a, b, c of a + b·new + c·new·(cached + new/2)."""
        return (0.0, self._prefill_token_s, 0.0)

    @property
    def step_coefficients(self) -> tuple[float, float, float]:
        """a, b, c of a + b·batch + c·kv tokens."""
        return (self._step_s, 0.0, 0.0)
