"""NIXL over UCX: over TCP on loopback, and apart from it whatever UCX chooses on one host (shared memory, CMA)."""

from __future__ import annotations

from collections.abc import Sequence

from bench.transfer.contract import Sample
from bench.transfer.pair import Candidate, PairMover
from bench.transfer.peers import first_version
from bench.transfer.process import Side
from bench.transfer.slabs import Slabs

MODULES = ("nixl", "nixl_cu12", "nixl_cu13")
ENV = (("UCX_NET_DEVICES", "lo"), ("NIXL_LOG_LEVEL", "WARN"), ("UCX_LOG_LEVEL", "error"))
# op, progress thread of the beginner, seconds between two looks at the state (0: as fast as it can)
Way = tuple[str, bool, float]
WAYS: tuple[Way, ...] = (
    ("WRITE", False, 1e-4),
    ("WRITE", False, 0.0),
    ("WRITE", True, 1e-4),
    ("WRITE", True, 0.0),
    ("READ", False, 1e-4),
    ("READ", True, 1e-4),
)


class Nixl(PairMover):
    """One agent a process. The agent that is written to (or read from) makes progress in NIXL's own thread."""

    polls = True

    def __init__(self, slabs: Slabs, python: str | None, name: str, tls: str, ways: Sequence[Way] = WAYS) -> None:
        super().__init__(slabs, python)
        self.name = name
        self.tls = tls
        self.ways = ways

    def candidates(self) -> list[Candidate]:
        env = (*ENV, ("UCX_TLS", self.tls))
        return [
            Candidate((("op", op), ("progress", progress), ("poll_s", poll)), env) for op, progress, poll in self.ways
        ]

    def open(self) -> None:
        self.module, self.setting["version"] = first_version(self.python, MODULES)
        super().open()

    def start(self, candidate: Candidate) -> tuple[Side, Side]:
        """(beginner, other): the beginner has the source slab for WRITE, the target slab for READ."""
        options = dict(candidate.config)
        roles = ("source", "target") if options["op"] == "WRITE" else ("target", "source")
        begin = self.side("nixl", roles[0], candidate, api=self.module, progress_thread=options["progress"])
        other = self.side("nixl", roles[1], candidate, api=self.module, progress_thread=True)
        begin.ask(card=other.ask()["card"])
        return begin, other

    def _move(self, candidate: Candidate, blocks: int) -> Sample:
        """CPU is told by slab: for READ the process that begins has the target's."""
        sample = super()._move(candidate, blocks)
        if dict(candidate.config)["op"] == "READ":
            return Sample(sample.seconds, sample.cpu_target_s, sample.cpu_source_s)
        return sample


def nixl_tcp(slabs: Slabs, python: str | None) -> Nixl:
    """UCX may use TCP only: what two hosts without RDMA have."""
    return Nixl(slabs, python, "nixl_tcp", "tcp")


def nixl_tcp_read(slabs: Slabs, python: str | None) -> Nixl:
    """TCP only and READ only: how serving engines that pull use it."""
    return Nixl(slabs, python, "nixl_tcp_read", "tcp", [way for way in WAYS if way[0] == "READ"])


def nixl_ucx_choice(slabs: Slabs, python: str | None) -> Nixl:
    """UCX may use all it has: on one host it takes shortcuts that two hosts do not have."""
    return Nixl(slabs, python, "nixl_ucx_choice", "all")
