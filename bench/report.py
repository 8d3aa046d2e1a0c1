"""What every benchmark prints and draws: progress, percentiles, marks, one JSON object as the last line, a plot."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def mark(value: float, limit: float, unit: str, *, at_most: bool) -> dict[str, Any]:
    """One mark of an issue: the figure reached, the figure asked for, and whether it holds."""
    holds = value <= limit if at_most else value >= limit
    return {"value": round(value, 4), "mark": limit, "unit": unit, "holds": holds}


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def cpu_seconds(pid: int) -> float:
    """User and system CPU seconds of a live process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def busy_share() -> Iterator[dict[str, float]]:
    """Share of all cores' time that was used inside the block, as ["busy"] afterwards."""
    before, started, out = _busy_jiffies(), time.monotonic(), {"busy": 0.0}
    yield out
    ticks = (time.monotonic() - started) * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
    out["busy"] = (_busy_jiffies() - before) / max(1.0, ticks)


def _busy_jiffies() -> int:
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return user + nice + system + irq + softirq


def finish(name: str, result: dict[str, Any]) -> None:
    """Print the result as the last line."""
    print(json.dumps({"bench": name, "cores": os.cpu_count(), **result}))


def plot_lines(
    name: str, title: str, xlabel: str, ylabel: str, lines: dict[str, tuple[list[float], list[float]]]
) -> None:
    """Draw lines {label: (xs, ys)} to bench/results/NAME.png when matplotlib is installed; else say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        progress("matplotlib is not installed, so no plot is drawn (pip install '.[bench]')")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker="o", markersize=3, label=label)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=100)
    progress(f"plot: bench/results/{name}.png")
