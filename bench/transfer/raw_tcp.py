"""The limit of TCP on loopback: contiguous and touched buffers, 1, 2 or 4 connections, 256 KiB to 4 MiB a call.

Socket buffers that the kernel tunes and fixed ones are tried too, and ways of waiting. The best of all stays.
"""

from __future__ import annotations

import itertools

from bench.transfer.contract import BLOCK_BYTES
from bench.transfer.pair import Candidate, PairMover
from bench.transfer.process import Side

CONNECTIONS = (1, 2, 4)
PIECES = (BLOCK_BYTES, 1 << 20, 4 << 20, 256 << 10)
BUFFERS = (1 << 20, 0, 4 << 20)  # bytes asked for; 0: tuned by the kernel
# "some": a receive returns with what is there; "all": with all of its bytes; "spin": neither side ever sleeps in a move
WAITS = ("all", "spin", "some")


class RawTcp(PairMover):
    """Sends from the beginning of the source slab into the beginning of the target slab; nothing is scattered."""

    name = "raw_tcp"
    quick_candidates = 24  # one connection, asleep and spinning

    def candidates(self) -> list[Candidate]:
        return [
            Candidate((("buffer", buffer), ("wait", wait)), (), (("connections", connections), ("piece", piece)))
            for connections, wait, piece, buffer in itertools.product(CONNECTIONS, WAITS, PIECES, BUFFERS)
        ]

    def start(self, candidate: Candidate) -> tuple[Side, Side]:
        target = self.side("raw_tcp", "target", candidate)
        return self.side("raw_tcp", "source", candidate, port=target.ask()["port"]), target

    def verify(self, blocks: int) -> None:
        self.slabs.clear_target()
        self.move(blocks)
        self.slabs.check_contiguous(blocks * BLOCK_BYTES)
