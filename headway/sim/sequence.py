"""A request on its way through the simulated fleet, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from headway.core.order import Key
from headway.sim.trace import TraceRequest


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True, eq=False)
class SimSequence:
    """Seconds are virtual, None until they have come. `noise` multiplies what its computing takes.

    computed: tokens whose KV its worker has; of those `cached` were not computed for it, `pulled` came by wire.
    """

    number: int
    request: TraceRequest
    noise: float = 1.0
    key: Key = (0, 0.0)
    phase: Phase = Phase.PREFILL
    computed: int = 0
    cached: int = 0
    pulled: int = 0
    landed: bool = True
    started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    refused: bool = False
    worker: str = ""
    predicted_s: float = 0.0

    @property
    def arrival_s(self) -> float:
        return self.request.arrival_s

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def pending(self) -> int:
        return self.request.prompt_tokens - self.computed if self.phase is Phase.PREFILL else 1

    @property
    def likely(self) -> int:
        """Its place is looked up anew whenever something is cached."""
        return 0

    @property
    def decoding(self) -> bool:
        return self.phase is Phase.DECODE

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between its tokens; None where there is but one."""
        if self.finished_s is None or self.first_token_s is None or self.request.output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.request.output_tokens - 1)
