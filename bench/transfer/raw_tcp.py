"""The limit of TCP on loopback: contiguous and touched buffers, 1, 2 or 4 connections, 256 KiB to 4 MiB a call.

Socket buffers that the kernel tunes and fixed ones of 4 MiB are tried too. The best of all stays.
"""

from __future__ import annotations

import itertools

from bench.transfer.contract import BLOCK_BYTES
from bench.transfer.pair import Candidate, PairMover
from bench.transfer.process import Side

CONNECTIONS = (1, 2, 4)
PIECES = (1 << 20, 256 << 10, 4 << 20)
BUFFERS = (0, 4 << 20)  # bytes asked for; 0: tuned by the kernel


class RawTcp(PairMover):
    """Sends from the beginning of the source slab into the beginning of the target slab; nothing is scattered."""

    name = "raw_tcp"

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(config=(("buffer", buffer),), question=(("connections", connections), ("piece", piece)))
            for connections, piece, buffer in itertools.product(CONNECTIONS, PIECES, BUFFERS)
        ]

    def start(self, candidate: Candidate) -> tuple[Side, Side]:
        target = self.side("raw_tcp", "target", candidate)
        return self.side("raw_tcp", "source", candidate, port=target.ask()["port"]), target

    def verify(self, blocks: int) -> None:
        self.slabs.clear_target()
        self.move(blocks)
        self.slabs.check_contiguous(blocks * BLOCK_BYTES)
