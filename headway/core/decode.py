"""Which decode worker goes on with an answer: room first, then the pace that it, and those it joins, would have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from headway.core.ask import Ask
from headway.core.links import Links
from headway.core.load import Role, WorkerLoad

# Of a handoff between nodes, on its way when prefill ends (the last chunk).
LATE_TOKENS = 512
# Of an answer, over which a late start is spread when it is weighed against a slower pace.
START_TOKENS = 64
# Each counts for more than any pace.
FULL_BATCH_S, NO_ROOM_S, MIXED_S = 1e6, 1e7, 1e8


class DecodeChoice:
    """Picks the decode worker for an answer whose prompt is computed at some node; those to come count as running."""

    def __init__(self, links: Links, token_bytes: int, block_size: int) -> None:
        self._links = links
        self._token_bytes = token_bytes
        self._block_size = block_size

    def pick(self, ask: Ask, usable: Sequence[WorkerLoad], node: str, now_s: float) -> WorkerLoad:
        """Of at least one worker, the one with the best pace; among equals the one with fewest, then that got least.

        The pace is that of the newcomer, plus what it adds to the step for each of those that run already. A handoff
        from another node moves the prompt's KV while it is computed; what is still on its way at the end counts.
        """
        tokens = ask.prompt_tokens + ask.expected_tokens // 2
        need = ask.prompt_tokens + ask.expected_tokens
        block = self._block_size
        late_bytes = min(ask.prompt_tokens, LATE_TOKENS) * self._token_bytes
        best, least_s, fewest = usable[0], math.inf, (0, 0)
        for load in usable:
            a, b, c = load.predictor.step
            running = load.running + load.coming
            pace_s = a + b * (running + 1) + c * (load.kv_tokens + tokens) + (b + c * tokens) * running
            if pace_s > least_s:
                continue
            if load.node != node:
                link = self._links.between(node, load.node)
                pace_s += (link.landing_s(late_bytes, now_s) - now_s) / START_TOKENS
            if running >= load.limits.batch:
                pace_s += FULL_BATCH_S
            if load.memory.committed_tokens + need > load.total_slots * block:
                pace_s += NO_ROOM_S
            # A mixed worker prefills all by itself; it joins others' leases only where nobody else can.
            if load.role is Role.MIXED:
                pace_s += MIXED_S
            if pace_s < least_s or (pace_s == least_s and (running, load.sent) < fewest):
                best, least_s, fewest = load, pace_s, (running, load.sent)
        return best
