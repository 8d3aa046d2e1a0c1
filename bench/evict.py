"""Which eviction policy keeps what will be asked for: replays public traces of block hashes through the real cache.

python -m bench.evict --traces FOLDER [--quick]    (--quick: the first quarter of each trace, under a minute)

FOLDER holds Mooncake-format files NAME.jsonl or NAME.jsonl.gz with `input_length` (tokens) and `hash_ids` (one for each
512 tokens of the prompt, chained). A request's full blocks are held, the missing ones are added, then all are let go:
one request at a time, answers not counted, as the traces do not tell their blocks.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evict_policies import Arc, Belady, Fifo, Lru, S3Fifo, Sieve, TwoQueues
from bench.report import finish, mark, plot_lines, progress
from headway.core.blocks import BlockCache
from headway.core.evict import AgedLfu, Policy

TRACE_BLOCK = 512
SHARES = [0.003, 0.01, 0.03, 0.1, 0.3]
TRACES = ["mooncake_conversation_trace", "mooncake_synthetic_trace", "toolagent_like_synth"]
POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": Lru,
    "lfu-aged": lambda capacity: AgedLfu(),
    "fifo": Fifo,
    "2q": TwoQueues,
    "arc": Arc,
    "s3-fifo": S3Fifo,
    "sieve": Sieve,
}


@dataclass(frozen=True)
class Prompt:
    """`keys`: its full blocks, chained; `tokens`: its length."""

    keys: list[bytes]
    tokens: int


@dataclass
class Future:
    """When each block is used next; `now` is the number of the prompt being served."""

    uses: dict[bytes, list[int]]
    now: int = 0

    @staticmethod
    def of(prompts: Sequence[Prompt]) -> Future:
        uses: dict[bytes, list[int]] = {}
        for at, prompt in enumerate(prompts):
            for key in prompt.keys:
                uses.setdefault(key, []).append(at)
        return Future(uses)

    def next_use(self, key: bytes) -> int:
        uses = self.uses[key]
        after = bisect_right(uses, self.now)
        return uses[after] if after < len(uses) else 1 << 60


def load(path: Path, share: float) -> list[Prompt]:
    """The first `share` of the trace's requests."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        rows = [json.loads(line) for line in lines]
    rows = rows[: int(len(rows) * share)]
    return [
        Prompt(
            [i.to_bytes(16, "big") for i in row["hash_ids"][: row["input_length"] // TRACE_BLOCK]], row["input_length"]
        )
        for row in rows
    ]


def replay(prompts: Sequence[Prompt], policy: Policy, capacity: int, future: Future | None = None) -> float:
    """Share of all prompt tokens that were found in a cache of `capacity` blocks."""
    cache, hits = BlockCache(policy), 0
    for at, prompt in enumerate(prompts):
        if future is not None:
            future.now = at
        keys = prompt.keys[:capacity]
        found = cache.match(keys, (prompt.tokens - 1) // TRACE_BLOCK)
        hits += len(found)
        used = list(found)
        for block in found:
            cache.hold(block)
        for key in keys[len(found) :]:
            while len(cache) >= capacity:
                cache.evict()
            resident = cache.get(key)
            if resident is None:
                used.append(cache.add(key, 0, used[-1] if used else None))
            else:
                cache.hold(resident)
                used.append(resident)
        cache.drop(used)
    return hits * TRACE_BLOCK / sum(prompt.tokens for prompt in prompts)


def study(name: str, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    unique = len({key for prompt in prompts for key in prompt.keys})
    rows = []
    for share in SHARES:
        capacity = max(1, int(unique * share))
        row: dict[str, Any] = {"trace": name, "share": share, "blocks": capacity}
        for policy, make in POLICIES.items():
            started = time.perf_counter()
            row[policy] = round(replay(prompts, make(capacity), capacity), 4)
            progress(f"{name} {share:.1%} {policy}: {row[policy]:.4f} in {time.perf_counter() - started:.1f} s")
        future = Future.of(prompts)
        row["belady"] = round(replay(prompts, Belady(capacity, future.next_use), capacity, future), 4)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: token hit rates in percent."""
    names = [*POLICIES, "belady"]
    lines = ["| trace | cache | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        figures = " | ".join(f"{100 * row[name]:.1f}" for name in names)
        lines.append(f"| {row['trace']} | {row['share']:.1%} | {figures} |")
    means = " | ".join(f"{100 * mean(rows, name):.2f}" for name in names)
    lines.append(f"| mean of all | | {means} |")
    return "\n".join(lines)


def mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows) / len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder with the traces")
    parser.add_argument("--quick", action="store_true", help="the first quarter of each trace")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in TRACES:
        paths = [path for suffix in (".jsonl", ".jsonl.gz") if (path := arguments.traces / (name + suffix)).exists()]
        if not paths:
            progress(f"{name} is not in {arguments.traces}: skipped")
            continue
        rows += study(name, load(paths[0], 0.25 if arguments.quick else 1.0))
    if not rows:
        parser.error(f"none of {', '.join(TRACES)} is in {arguments.traces}; name the folder that holds them")
    print(table(rows))
    gains = {name: round(mean(rows, name) - mean(rows, "lru"), 4) for name in [*POLICIES, "belady"]}
    marks = {"gain_over_lru": mark(gains["lfu-aged"], 0.0, "share of prompt tokens", at_most=False)}
    lines = {
        name: ([100 * row["share"] for row in rows[: len(SHARES)]], [row[name] for row in rows[: len(SHARES)]])
        for name in gains
    }
    plot_lines("evict", f"Token hit rate, {rows[0]['trace']}", "% of unique blocks", "hit rate", lines)
    finish("evict", {"quick": arguments.quick, "rows": rows, "gain_over_lru": gains, "marks": marks})


if __name__ == "__main__":
    main()
