"""Prefixes that are not cached yet, but will be: those of prompts that wait or are computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from headway.core.ask import NO_PROMISE, Promised
from headway.core.keys import common_blocks

# Prompts that are looked at for one first block, the newest ones.
MOST = 64


class Promises:
    """Chains of block keys by the worker that will have computed them, so that a burst of siblings computes its prefix
    once: in that worker's order they come after it. Another worker of the node would start at once, and find nothing.
    """

    def __init__(self) -> None:
        self._roots: dict[bytes, OrderedDict[Hashable, _Promise]] = {}
        self._chains: dict[Hashable, bytes] = {}

    def add(self, name: Hashable, worker_id: str, keys: Sequence[bytes], ready_s: float, pulled: int = 0) -> None:
        """A prompt with these block keys was sent to the worker, and should be computed at `ready_s`. One of the same
        name is replaced.

        Its first `pulled` blocks are on their way from another node; who needs no more of it than these fetches them
        too, or would start before they are there.
        """
        self.remove(name)
        if not keys:
            return
        chains = self._roots.setdefault(keys[0], OrderedDict())
        chains[name] = _Promise(worker_id, keys, ready_s, pulled)
        self._chains[name] = keys[0]
        if len(chains) > MOST:
            oldest, _ = chains.popitem(last=False)
            del self._chains[oldest]

    def remove(self, name: Hashable) -> None:
        """It is computed (from now on block events tell), or given up; an unknown name is ignored."""
        root = self._chains.pop(name, None)
        if root is not None:
            chains = self._roots[root]
            del chains[name]
            if not chains:
                del self._roots[root]

    def overlap(self, keys: Sequence[bytes], block_size: int = 1) -> dict[str, Promised]:
        """For every worker with such a prompt, how many leading tokens of the chain it will have."""
        found: dict[str, Promised] = {}
        for name, promise in self._roots[keys[0]].items() if keys and keys[0] in self._roots else ():
            common = common_blocks(keys, promise.keys)
            best = found.get(promise.worker_id, NO_PROMISE)
            if common > promise.pulled and (-common * block_size, promise.ready_s) < (-best.tokens, best.ready_s):
                found[promise.worker_id] = Promised(common * block_size, promise.ready_s, name)
        return found


class _Promise(NamedTuple):
    worker_id: str
    keys: Sequence[bytes]
    ready_s: float
    pulled: int
