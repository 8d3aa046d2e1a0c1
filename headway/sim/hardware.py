"""How fast simulated workers are: formulas of time, with the source of their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from headway.core.predict import Predictor


class Hardware(Protocol):
    """token_bytes: KV bytes of a token. cache_tokens: that a node keeps. batch: sequences a decode worker runs."""

    @property
    def name(self) -> str: ...
    @property
    def token_bytes(self) -> int: ...
    @property
    def cache_tokens(self) -> int: ...
    @property
    def batch(self) -> int: ...
    def prefill_s(self, new: int, cached: int) -> float: ...
    def step_s(self, batch: int, kv_tokens: float) -> float: ...
    @property
    def predictor(self) -> Predictor:
        """What workers on it come to report about themselves."""


@dataclass(frozen=True)
class Linear:
    """The formulas of core.predict. `source`: where the numbers come from."""

    name: str
    source: str
    predictor: Predictor
    token_bytes: int
    cache_tokens: int
    batch: int = 256

    def prefill_s(self, new: int, cached: int) -> float:
        return self.predictor.prefill_s(new, cached)

    def step_s(self, batch: int, kv_tokens: float) -> float:
        a, b, c = self.predictor.step
        return a + b * batch + c * kv_tokens


@dataclass(frozen=True)
class Mocker:
    """The mocker of the reference system, with its default timing: the prefill of n tokens takes
    4.209989e-7·n² + 1.518344e-2·n + 16.50142 ms, a step max(1, −25.74·u² + 54.01·u + 5.74) ms; u: share of KV in use.
    """

    name: str = "mocker"
    token_bytes: int = 131072
    cache_tokens: int = 16384 * 64
    batch: int = 256

    def prefill_s(self, new: int, cached: int) -> float:
        return (4.209989e-7 * new * new + 1.518344e-2 * new + 16.50142) / 1e3 if new > 0 else 0.0

    def step_s(self, batch: int, kv_tokens: float) -> float:
        use = min(1.0, kv_tokens / self.cache_tokens)
        return max(1.0, -25.74 * use * use + 54.01 * use + 5.74) / 1e3

    @property
    def predictor(self) -> Predictor:
        """Steps as the chord from empty to half full, where fleets are run."""
        return Predictor(
            (16.50142e-3, 1.518344e-5, 2 * 4.209989e-10), (5.74e-3, 0.0, (54.01 - 25.74 / 2) / 1e3 / self.cache_tokens)
        )


# Prefill, KV and cache are the setting of the comparison of policies (docs/routing.md), which says nothing of decode:
# its steps are made up, near those of a 70 B model on eight GPUs.
STUDY = Linear(
    "study",
    "docs/routing.md; decode steps are made up",
    Predictor((0.02, 1.1e-4, 2.1e-9), (0.015, 1e-4, 2e-8)),
    token_bytes=320 * 1024,
    cache_tokens=2500 * 512,
)
