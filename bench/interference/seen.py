"""The load's shape, what is seen of each request, and the figures of it; without what needs services."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import percentile

STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 4, 64, 128
LONG_PROMPT_TOKENS, LONG_OUTPUT_TOKENS = 1500, 8
# Before the first long prompt.
ALONE_S = 2.0
STREAM_TTFT_S, LONG_TTFT_S = 1.0, 8.0


@dataclass
class Seen:
    """One request, in seconds since the load began. `token_s`: when each token came; `error`: why it ended early."""

    kind: str
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.token_s)]

    def good(self, itl_s: float) -> bool:
        """First token in time, and of the gaps at most one in a hundred over `itl_s`."""
        within = self.ttft_s <= (LONG_TTFT_S if self.kind == "long" else STREAM_TTFT_S) if self.token_s else False
        return within and not self.error and (self.kind == "long" or percentile(self.gaps_s, 0.99) <= itl_s)


def figures(seen: Sequence[Seen], seconds: float, itl_s: float) -> dict[str, Any]:
    """TTFT and ITL of the chats, TTFT of the long prompts, and tokens a second of requests within both objectives."""
    chats = [one for one in seen if one.kind == "stream"]
    longs = [one for one in seen if one.kind == "long"]
    gaps = [gap for one in chats for gap in one.gaps_s]
    sizes = {"stream": PROMPT_TOKENS + OUTPUT_TOKENS, "long": LONG_PROMPT_TOKENS + LONG_OUTPUT_TOKENS}
    outputs = {"stream": OUTPUT_TOKENS, "long": LONG_OUTPUT_TOKENS}
    done = [one for one in seen if len(one.token_s) == outputs[one.kind]]
    return {
        "stream_ttft_ms": _spread([one.ttft_s for one in chats if one.token_s]),
        "stream_itl_ms": _spread(gaps),
        "stream_tokens_per_s": round(sum(len(one.token_s) for one in chats) / seconds, 1),
        "long_ttft_ms": _spread([one.ttft_s for one in longs if one.token_s]),
        "long": len(longs),
        "long_without_a_token": sum(not one.token_s for one in longs),
        "errors": dict(Counter(f"{one.kind} {one.error}" for one in seen if one.error)),
        "good_tokens_per_s": round(sum(sizes[one.kind] for one in done if one.good(itl_s)) / seconds, 1),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {name: round(percentile(seconds, share) * 1e3, 1) for name, share in shares.items()} | {
        "max": round(max(seconds) * 1e3, 1)
    }
