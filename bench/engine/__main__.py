"""The engine by itself: prefill and decode beside other engines on the same model, in turns.

python -m bench.engine [--peers transformers] [--threads 1,2] [--repeats 5] [--quick]

Each engine is a process of its own, of which one works at a time. --quick: two sizes, two repeats.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from bench.report import finish, mark, median, progress
from headway.models import resolve

PREFILL, DECODE = (128, 512, 1024, 2048), (1, 4, 8, 16)
MODEL = "smollm2"
# phase, size → times the peer's speed.
MARKS = {
    "f32_prefill_vs_transformers": ("prefill", 512, 1.1),
    "f32_decode_b8_vs_transformers": ("decode", 8, 1.3),
    "f32_decode_b16_vs_transformers": ("decode", 16, 1.5),
}


class Child:
    """An engine in its process; see bench.engine.child."""

    def __init__(self, name: str, folder: str, threads: int) -> None:
        command = [sys.executable, "-m", "bench.engine.child", name, folder, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def seconds(self, phase: str, size: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"phase": phase, "size": size}) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"bench.engine: {' '.join(map(str, self._process.args))} ended")  # type: ignore[arg-type]
        return dict(json.loads(line))


def compare(names: list[str], threads: int, repeats: int, sizes: list[tuple[str, int]]) -> dict[str, Any]:
    """phase → size → engine → tokens a second, medians; the engines take turns."""
    folder = str(resolve(MODEL))
    children = {name: Child(name, folder, threads) for name in names}
    table: dict[str, Any] = {"prefill": {}, "decode": {}}
    for phase, size in sizes:
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name, child in children.items():
                times[name].append(child.seconds(phase, size))
        row = {name: round(size / median(taken), 1) for name, taken in times.items()}
        progress(f"{threads} threads, {phase} {size}: {row}")
        table[phase][str(size)] = row
    for child in children.values():
        child.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="transformers", help="separated by commas")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    names = ["headway", *filter(None, arguments.peers.split(","))]
    sizes = [("prefill", size) for size in PREFILL] + [("decode", size) for size in DECODE]
    if arguments.quick:
        sizes = [("prefill", 128), ("decode", 4)]
    repeats = 2 if arguments.quick else arguments.repeats
    by_threads = {threads: compare(names, int(threads), repeats, sizes) for threads in arguments.threads.split(",")}
    marks = {}
    most = by_threads[max(by_threads, key=int)]
    for name, (phase, size, least) in MARKS.items():
        row = most[phase].get(str(size), {})
        if "transformers" in row:
            marks[name] = mark(row["headway"] / row["transformers"], least, "ratio", at_most=False)
    finish("engine", {"model": MODEL, "repeats": repeats, "tokens_per_s": by_threads, "marks": marks})


if __name__ == "__main__":
    main()
