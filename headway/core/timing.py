"""What forwards took, as the predictor of what the next ones take."""

from __future__ import annotations

from headway.core.predict import Predictor

WEIGHT = 0.2
# A shorter prompt says more of a forward's fixed cost than of the price of a token.
LEAST_TOKENS = 64


class StepTimes:
    """Running averages (exponential, weight 0.2) of seconds per prefilled token and per decode step.

    Starts from a guess that only has to order work until the first forwards are measured.
    """

    def __init__(self, prefill_token_s: float = 1e-3, step_s: float = 1e-2) -> None:
        self._prefill_token_s = prefill_token_s
        self._step_s = step_s
        self._measured_prefill = self._measured_step = False
        self.predictor = self._predictor()

    @property
    def prefill_token_s(self) -> float:
        """Seconds per prefilled token; 0 until measured."""
        return self._prefill_token_s if self._measured_prefill else 0.0

    def observe(self, prefill_tokens: int, decoding: int, seconds: float) -> None:
        """One forward of `prefill_tokens` prompt tokens and `decoding` decode steps took `seconds`."""
        if prefill_tokens >= LEAST_TOKENS and not decoding:
            weight = WEIGHT if self._measured_prefill else 1.0
            self._prefill_token_s += weight * (seconds / prefill_tokens - self._prefill_token_s)
            self._measured_prefill = True
        elif decoding and not prefill_tokens:
            weight = WEIGHT if self._measured_step else 1.0
            self._step_s += weight * (seconds - self._step_s)
            self._measured_step = True
        else:
            return
        self.predictor = self._predictor()

    def _predictor(self) -> Predictor:
        """Linear in new tokens, constant in the batch."""
        return Predictor((0.0, self._prefill_token_s, 0.0), (self._step_s, 0.0, 0.0))
