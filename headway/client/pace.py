"""The pace of one streamed answer as the client sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from headway.client.results import Event, Finished, TextDelta


class Pace:
    """Make it when the request is sent and feed it every event. Seconds; a delta of several tokens shares its gap."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._sent_s = clock()
        self._last_s: float | None = None
        self.ttft_s: float | None = None
        self.gaps_s: list[float] = []
        self.finished: Finished | None = None

    def push(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.finished = event
        if not isinstance(event, TextDelta) or not event.tokens:
            return
        now = self._clock()
        count = len(event.tokens)
        if self._last_s is None:
            self.ttft_s = now - self._sent_s
        else:
            self.gaps_s += [(now - self._last_s) / count] * count
        self._last_s = now

    def itl_s(self, quantile: float) -> float:
        """Inter-token latency by nearest rank; NaN for an answer of one token."""
        return nearest_rank(self.gaps_s, quantile)

    def summary(self) -> str:
        """One line: tokens, TTFT, ITL, cache, workers, handoff."""
        if self.finished is None:
            return "unfinished"
        usage, ends = self.finished.usage, self.finished
        parts = [f"{usage.output_tokens} tokens", f"TTFT {milliseconds(self.ttft_s)}"]
        if self.gaps_s:
            parts.append(f"ITL p50 {milliseconds(self.itl_s(0.5))} p99 {milliseconds(self.itl_s(0.99))}")
        parts.append(f"prompt {usage.cached_tokens} cached + {usage.computed_tokens} computed")
        parts.append(" → ".join(dict.fromkeys(filter(None, [ends.prefill_worker, ends.decode_worker]))))
        parts.append(f"handoff {usage.handoff_bytes} bytes")
        if ends.replays:
            parts.append(f"{ends.replays} replays")
        return " · ".join(parts)


def nearest_rank(values: Sequence[float], quantile: float) -> float:
    """The smallest value that at least `quantile` of all values do not exceed; NaN without values."""
    if not values:
        return math.nan
    return sorted(values)[max(math.ceil(quantile * len(values)) - 1, 0)]


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.1f} ms"
