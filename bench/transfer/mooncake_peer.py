"""Mooncake's transfer engine over TCP, from 1, 2 and 4 calling threads, with and without its connection pool.

It listens on all addresses whatever it is told, so it runs only where the benchmark has its own network namespace.
"""

from __future__ import annotations

import itertools

from bench.transfer.contract import SkipError
from bench.transfer.namespace import alone
from bench.transfer.pair import Candidate, PairMover
from bench.transfer.peers import version_of
from bench.transfer.process import Side

ENV = (
    ("MC_TCP_BIND_ADDRESS", "127.0.0.1"),
    ("MC_LOG_LEVEL", "ERROR"),
    ("MC_FORCE_TCP", "1"),
)
POOL = ("MC_TCP_ENABLE_CONNECTION_POOL", "1")
ENVIRONMENTS = (
    (POOL,),
    (("MC_TCP_SLICE_SIZE", str(4 << 20)),),
    (POOL, ("MC_TCP_LANES_PER_PEER", "4")),
    (),
)
THREADS = (1, 2, 4)


class Mooncake(PairMover):
    """Batches of whole slots; the slab of each side is registered once."""

    name = "mooncake"
    polls = True

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(env=(*ENV, *more), question=(("threads", threads),))
            for threads, more in itertools.product(THREADS, ENVIRONMENTS)
        ]

    def open(self) -> None:
        if not alone():
            raise SkipError("it listens on all addresses, and this run has no network namespace of its own")
        self.setting["version"] = version_of(self.python, "mooncake.engine")
        super().open()

    def start(self, candidate: Candidate) -> tuple[Side, Side]:
        target = self.side("mooncake", "target", candidate)
        return self.side("mooncake", "source", candidate, **target.ask()), target
