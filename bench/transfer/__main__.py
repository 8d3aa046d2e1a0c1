"""Moving KV blocks between two processes: the limits of this machine, peers, and Headway's planes, in turns.

python -m bench.transfer [--peers nixl,mooncake,redis] [--peers-python PYTHON] [--quick]

For 16, 1,024 and 8,192 tokens every mover tunes itself, is verified, and then takes its turn once a round. GB are 10^9
bytes. CPU of loopback TCP is mostly paid by the side whose system call happens to carry the packets.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from bench.report import busy_share, finish, plot_lines, progress
from bench.transfer import namespace, summary
from bench.transfer.contract import BLOCK_TOKENS, Mover, MoverError, Sample, SkipError
from bench.transfer.control import control
from bench.transfer.iperf3 import Iperf3
from bench.transfer.memcpy import Memcpy
from bench.transfer.mooncake_peer import Mooncake
from bench.transfer.nixl_peer import nixl_tcp, nixl_tcp_read, nixl_ucx_choice
from bench.transfer.plane import PlaneMover
from bench.transfer.raw_tcp import RawTcp
from bench.transfer.redis_peer import Redis
from bench.transfer.slabs import Slabs

# nixl only where this Python has it.
PLANES = ("socket", "grpc", "nixl")
SIZES = [1, 64, 512]  # blocks
SLOTS = 576
ROUNDS = {1: 100, 64: 30, 512: 10}
QUICK_ROUNDS = {1: 15, 64: 7, 512: 3}
BOX_BOUND = 0.9
PeerMaker = Callable[[Slabs, str | None], Mover]
PEERS: dict[str, tuple[PeerMaker, ...]] = {
    "nixl": (nixl_tcp, nixl_tcp_read, nixl_ucx_choice),
    "mooncake": (Mooncake,),
    "redis": (Redis,),
}


def all_movers(slabs: Slabs, peers: Sequence[str], python: str | None) -> list[Mover]:
    """Limits first, then Headway's planes, then peers."""
    limits: list[Mover] = [Memcpy(slabs), RawTcp(slabs, sys.executable), Iperf3()]
    planes = [PlaneMover(name, SLOTS) for name in PLANES]
    return limits + planes + [make(slabs, python) for peer in peers for make in PEERS[peer]]


class Contest:
    """The movers that run here, and what was said of the others."""

    def __init__(self, movers: Sequence[Mover], stack: ExitStack) -> None:
        self.ready: list[Mover] = []
        self.skipped: dict[str, str] = {}
        for mover in movers:
            progress(f"{mover.name}: starting, tuning, verifying")
            try:
                self._prepare(mover, stack)
            except SkipError as reason:
                self.skipped[mover.name] = str(reason)
                progress(f"{mover.name}: skipped: {reason}")
            except MoverError as error:
                self._failed(mover, error)

    def _failed(self, mover: Mover, error: MoverError) -> None:
        self.skipped[mover.name] = f"failed: {error}"
        progress(f"{mover.name}: FAILED: {error}")

    def _prepare(self, mover: Mover, stack: ExitStack) -> None:
        sizes = [blocks for blocks in SIZES if blocks >= mover.least_blocks]
        with ExitStack() as opened:
            opened.enter_context(mover)
            mover.tune(sizes)
            for blocks in sizes:
                mover.verify(blocks)
            self.ready.append(mover)
            stack.push(opened.pop_all())

    def play(self, rounds: dict[int, int]) -> tuple[summary.Samples, dict[int, float]]:
        """Samples by size and mover, and the share of the box that was busy at each size (by tokens)."""
        samples: summary.Samples = {}
        busy: dict[int, float] = {}
        for blocks, count in rounds.items():
            players = [mover for mover in self.ready if blocks >= mover.least_blocks]
            samples[blocks] = {mover.name: [] for mover in players}
            progress(f"{blocks * BLOCK_TOKENS} tokens: {count} rounds of {len(players)}")
            with busy_share() as share:
                for number in range(count):
                    turn = number % len(players)  # nobody always comes after the same one
                    for mover in players[turn:] + players[:turn]:
                        if mover.name not in self.skipped:
                            self._take(mover, blocks, samples[blocks][mover.name])
            busy[blocks * BLOCK_TOKENS] = round(share["busy"], 3)
            self.ready = [mover for mover in self.ready if mover.name not in self.skipped]
            samples[blocks] = {name: taken for name, taken in samples[blocks].items() if name not in self.skipped}
        return samples, busy

    def _take(self, mover: Mover, blocks: int, into: list[Sample]) -> None:
        try:
            into.append(mover.move(blocks))
        except MoverError as error:
            self._failed(mover, error)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    slabs = Slabs(SLOTS)
    peers = [name for name in arguments.peers.split(",") if name]
    movers = all_movers(slabs, peers, arguments.peers_python)
    for mover in movers:
        mover.quick = arguments.quick
    with ExitStack() as stack:
        stack.callback(slabs.close)
        contest = Contest(movers, stack)
        with busy_share() as others:
            time.sleep(1)
        samples, busy = contest.play(QUICK_ROUNDS if arguments.quick else ROUNDS)
        held_up = control(SLOTS, quick=arguments.quick)
    bound = sorted(tokens for tokens, share in busy.items() if share > BOX_BOUND)
    if bound:
        progress(f"the box itself was the bottleneck (CPU above {BOX_BOUND:.0%}) at {bound} tokens")
    return {
        "network": namespace.description(),
        "skipped": contest.skipped,
        "rows": summary.rows(samples),
        "over_raw_tcp": summary.over_raw_tcp(samples),
        "cpu_busy_share": busy,
        "cpu_busy_share_while_nothing_moved": round(others["busy"], 3),
        "cpu_bound_tokens": bound,
        "settings": {mover.name: mover.setting for mover in contest.ready},
        "acquires": held_up["figures"],
        "marks": {**summary.marks(samples), "acquire_p99_ms_under_pull": held_up["mark"]},
    }


def plot(table: list[dict[str, Any]]) -> None:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for entry in table:
        xs, ys = lines.setdefault(entry["mover"], ([], []))
        xs.append(float(entry["tokens"]))
        ys.append(entry["gb_s"])
    plot_lines("transfer", "Moving KV blocks between two processes", "tokens", "GB/s (median)", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PEERS), help="which peers to run, when installed ('' for none)")
    parser.add_argument(
        "--peers-python",
        default=os.environ.get("HEADWAY_PEERS_PYTHON"),
        help="python of a virtual environment that has the peers (default: $HEADWAY_PEERS_PYTHON)",
    )
    parser.add_argument("--quick", action="store_true", help="about a minute")
    arguments = parser.parse_args()
    if unknown := set(filter(None, arguments.peers.split(","))) - set(PEERS):
        parser.error(f"unknown peers {sorted(unknown)}; there are {list(PEERS)}")
    if not namespace.enter():
        progress("no network namespace of our own (that needs root): all servers listen on loopback")
    result = run(arguments)
    plot(result["rows"])
    finish("transfer", {"quick": arguments.quick, **result})


if __name__ == "__main__":
    main()
