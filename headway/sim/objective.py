"""When a first token is in time."""

from __future__ import annotations

from dataclasses import dataclass

from headway.sim.hardware import Hardware
from headway.sim.trace import TraceRequest


@dataclass(frozen=True)
class Objective:
    """A first token is in time within `base_s` + `factor` × what the whole prompt takes on an idle worker."""

    base_s: float = 1.0
    factor: float = 2.0

    def seconds(self, request: TraceRequest, hardware: Hardware) -> float:
        """Within which its first token should come."""
        return self.base_s + self.factor * hardware.prefill_s(request.prompt_tokens, 0)

    def met(self, request: TraceRequest, ttft_s: float | None, hardware: Hardware) -> bool:
        """Whether it came within; None: never."""
        return ttft_s is not None and ttft_s <= self.seconds(request, hardware)
