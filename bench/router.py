"""What a routing decision costs: block keys, index lookup, placement; and the index itself, in speed and memory.

python -m bench.router [--quick]

A decision is what the router does between a request's tokens and its workers, in the very objects that serve. Half of
the workers are prefill workers with four prompts queued each, every worker is a node of its own; a prompt shares a
system prompt of 512 tokens with all nodes, half of itself with one node and three quarters with another.
"""

from __future__ import annotations

import argparse
import gc
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.report import finish, mark, median, plot_lines, progress
from headway.core.ask import Ask
from headway.core.backlog import Backlog, Prompt
from headway.core.filters import Rules
from headway.core.index import PrefixIndex
from headway.core.keys import block_keys, join_keys, key_namespace
from headway.core.links import Links
from headway.core.load import Role, WorkerLoad
from headway.core.place import Placer
from headway.core.policy import LeastDelay, Planner
from headway.core.predict import Predictor
from headway.core.step import StepLimits

BLOCK = 16
LENGTHS = {"1k": 1024, "8k": 8192, "32k": 32768, "128k": 131072}
FLEETS = (8, 64, 512)
# The fleet size of the marks: the reference's figures are of 64 workers.
MARKED = 64
MARKS_US = {"1k": 120.0, "8k": 900.0, "32k": 3600.0, "128k": 12000.0}
# The reference's native tree, hash and find, same lengths, 64 workers, on a machine with as many cores.
NATIVE_US = {"1k": 40.0, "8k": 162.0, "32k": 633.0, "128k": 2829.0}
SYSTEM_TOKENS = 512
NAMESPACE = key_namespace(b"bench", b"router", "", "")
PREDICTOR = Predictor((0.02, 1.1e-4, 2.1e-9), (0.015, 1e-4, 2e-8))
BATCH = 32
LIMITS = StepLimits(chunk_s=0.5)


def make_placer(workers: int) -> Placer:
    links = Links(0.001, 25e9)
    planner = Planner(links, token_bytes=131072, block_size=BLOCK)
    rules = Rules(BLOCK, local_prefill_tokens=2048, itl_objective_s=0.1, max_wait_s=300.0)
    placer = Placer(rules, LeastDelay(planner), planner, PrefixIndex(1 << 24))
    draw = random.Random(1)
    for at in range(workers):
        role = Role.PREFILL if at % 2 == 0 else Role.DECODE
        load = WorkerLoad(
            f"worker-{at}", f"node-{at}", role, ready=True, total_slots=100_000, limits=LIMITS,
            predictor=PREDICTOR, backlog=Backlog(LIMITS), sent=draw.randrange(1000, 2000),
        )  # fmt: skip
        if role is Role.PREFILL:
            for number in range(4):
                seconds = draw.uniform(0.1, 2.0)
                load.backlog.add(Prompt((at, number), (0, seconds), seconds, 1000), 0.0)
        else:
            for _ in range(16):
                load.join(draw.randrange(500, 8000), 200)
                load.begin()
        placer.add(load)
    return placer


def fill(placer: Placer, prompt: list[int]) -> None:
    keys = block_keys(NAMESPACE, prompt, BLOCK)
    for at in range(len(placer.loads)):
        placer.index.stored(f"node-{at}", join_keys(keys[: SYSTEM_TOKENS // BLOCK]))
    placer.index.stored("node-0", join_keys(keys[: len(keys) // 2]))
    placer.index.stored("node-2", join_keys(keys[: len(keys) * 3 // 4]))


def decide(placer: Placer, prompt: list[int], now_s: float) -> None:
    """As services.router does it for a request."""
    keys = block_keys(NAMESPACE, prompt, BLOCK)
    resident, promised = placer.overlaps(keys)
    ask = Ask(
        prompt_tokens=len(prompt),
        keys=keys,
        expected_tokens=256,
        resident=resident,
        promised=promised,
    )
    assert placer.place(ask, now_s) is not None


def microseconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e6)
    return median(times)


def decisions(repeats: int) -> dict[str, dict[str, float]]:
    """workers → length → microseconds; and of them, hashing alone under "hash"."""
    draw = random.Random(2)
    prompts = {name: [draw.randrange(32_000) for _ in range(length)] for name, length in LENGTHS.items()}
    found: dict[str, dict[str, float]] = {"hash": {}}
    for name, prompt in prompts.items():
        count = max(5, repeats * 1024 // len(prompt))
        found["hash"][name] = microseconds(lambda p=prompt: block_keys(NAMESPACE, p, BLOCK), count)  # type: ignore[misc]
    for workers in FLEETS:
        row = found[str(workers)] = {}
        for name, prompt in prompts.items():
            placer = make_placer(workers)
            fill(placer, prompt)
            count = max(5, repeats * 1024 // len(prompt))
            row[name] = microseconds(lambda: decide(placer, prompt, 0.5), count)  # noqa: B023
        progress(f"{workers:4d} workers: " + ", ".join(f"{name} {value:.0f} µs" for name, value in row.items()))
    return found


def index_speed(blocks: int) -> float:
    """Stored blocks a second, in batches of 32, over 64 nodes."""
    draw = random.Random(3)
    batches = [draw.randbytes(16 * BATCH) for _ in range(blocks // BATCH)]
    index = PrefixIndex(1 << 26)
    for at in range(64):
        index.snapshot(f"node-{at}")
    started = time.perf_counter()
    for at, batch in enumerate(batches):
        index.stored(f"node-{at % 64}", batch)
    return blocks / (time.perf_counter() - started)


def index_bytes(millions: list[float]) -> dict[str, float]:
    """Resident bytes of an index with so many million blocks, two holders each, per block; each in its own process."""
    found = {}
    for size in millions:
        command = [sys.executable, "-m", "bench.router", "--memory", str(int(size * 1e6))]
        found[f"{size:g}"] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        progress(f"{size:g} million blocks: {found[f'{size:g}']:.0f} bytes each")
    return found


def measure_memory(blocks: int) -> float:
    draw = random.Random(4)
    index = PrefixIndex(1 << 26)
    nodes = [f"node-{at}" for at in range(64)]
    pairs = [draw.sample(nodes, 2) for _ in range(500)]
    gc.collect()
    before = _resident_bytes()
    for at in range(blocks // 1024):
        batch = draw.randbytes(16 * 1024)
        for node in pairs[at % len(pairs)]:
            index.stored(node, batch)
    return (_resident_bytes() - before) / len(index)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.router", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", type=int, metavar="BLOCKS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(measure_memory(arguments.memory))
        return
    found = decisions(50 if arguments.quick else 400)
    speed = median([index_speed(200_000 if arguments.quick else 2_000_000) for _ in range(3)])
    progress(f"index: {speed / 1e6:.2f} million blocks/s")
    sizes = [1.0] if arguments.quick else [8.0, 9.0, 10.0, 11.0, 11.5, 12.0, 13.0, 14.0, 15.0, 16.0]
    memory = index_bytes(sizes)
    marked = found[str(MARKED)]
    marks: dict[str, Any] = {
        f"decide_{name}_us": mark(marked[name], limit, "µs", at_most=True) for name, limit in MARKS_US.items()
    }
    marks["index_blocks_per_s"] = mark(speed, 0.7e6, "blocks/s", at_most=False)
    marks["index_bytes_per_block"] = mark(max(memory.values()), 140, "bytes", at_most=True)
    against = {name: round(marked[name] / NATIVE_US[name], 2) for name in LENGTHS}
    lengths = [float(length) for length in LENGTHS.values()]
    lines = {f"{workers} workers": (lengths, [found[str(workers)][name] for name in LENGTHS]) for workers in FLEETS}
    plot_lines("router", "a routing decision, hashing included", "prompt tokens", "µs", lines)
    rounded = {row: {name: round(value, 1) for name, value in columns.items()} for row, columns in found.items()}
    finish(
        "router",
        {
            "quick": arguments.quick,
            "decide_us": rounded,
            "times_the_native_tree": against,
            "index_bytes": {size: round(value, 1) for size, value in memory.items()},
            "marks": marks,
        },
    )


if __name__ == "__main__":
    main()
