"""Prompts made from a trace: its blocks become tokens, so that prompts share the prefixes that the trace says."""

from __future__ import annotations

import random
from collections import OrderedDict

from headway.sim.trace import Trace, TraceRequest

# Blocks whose tokens are kept, the last used ones.
MOST = 65536


class Prompts:
    """Token ids below `vocabulary` for each request of a trace; the same for the same blocks."""

    def __init__(self, trace: Trace, vocabulary: int = 128) -> None:
        self._block = trace.block_size
        # Each byte's remainder: what sends requests must not take the processor from those who answer them.
        self._below = bytes(byte % vocabulary for byte in range(256))
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()
        self._made = 0

    def tokens(self, request: TraceRequest) -> list[int]:
        """As many as the request says; what no block tells is like nothing else."""
        parts = [self._tokens_of(key) for key in request.keys]
        have = len(parts) * self._block
        if have < request.prompt_tokens:
            self._made += 1
            parts.append(self._draw(f"own {self._made}", request.prompt_tokens - have))
        return list(b"".join(parts)[: request.prompt_tokens])

    def _tokens_of(self, key: bytes) -> bytes:
        tokens = self._blocks.pop(key, None)
        if tokens is None:
            tokens = self._draw(key.hex(), self._block)
        self._blocks[key] = tokens
        if len(self._blocks) > MOST:
            self._blocks.popitem(last=False)
        return tokens

    def _draw(self, seed: str, count: int) -> bytes:
        return random.Random(seed).randbytes(count).translate(self._below)
