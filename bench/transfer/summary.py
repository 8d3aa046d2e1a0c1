"""From samples to rows, ratios of alternated pairs, and the marks of the issue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.report import mark, median, percentile
from bench.transfer.contract import BLOCK_BYTES, BLOCK_TOKENS, Sample

Samples = dict[int, dict[str, list[Sample]]]  # blocks -> name of the mover -> one sample a round
MARKED_FROM = 64  # blocks: the marks are for 1,024 tokens and more


class RatioMark(NamedTuple):
    """Speed of a plane over a rival's, in the same rounds."""

    name: str
    plane: str
    rival: str
    at_least: float


RATIOS = (
    RatioMark("socket_vs_raw_tcp", "socket", "raw_tcp", 0.9),
    RatioMark("socket_vs_mooncake", "socket", "mooncake", 1.0),
    RatioMark("socket_vs_nixl_tcp", "socket", "nixl_tcp", 2.0),
)
GRPC_GB_S = 0.7
SOCKET_CPU_S_PER_GB = 0.5


def gigabytes(blocks: int) -> float:
    return blocks * BLOCK_BYTES / 1e9


def row(name: str, blocks: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """One mover at one size: GB/s at the median, milliseconds, CPU seconds a GB of each side."""
    size, seconds = gigabytes(blocks), [sample.seconds for sample in samples]
    return {
        "mover": name,
        "tokens": blocks * BLOCK_TOKENS,
        "gb_s": round(size / median(seconds), 3),
        "p50_ms": round(median(seconds) * 1e3, 3),
        "p99_ms": round(percentile(seconds, 0.99) * 1e3, 3),
        "best_gb_s": round(size / min(seconds), 3),
        "source_cpu_s_per_gb": round(median([sample.cpu_source_s for sample in samples]) / size, 3),
        "target_cpu_s_per_gb": round(median([sample.cpu_target_s for sample in samples]) / size, 3),
        "between_cpu_s_per_gb": round(median([sample.cpu_between_s for sample in samples]) / size, 3),
        "samples": len(samples),
    }


def rows(samples: Samples) -> list[dict[str, Any]]:
    return [row(name, blocks, taken) for blocks, movers in samples.items() for name, taken in movers.items()]


def ratio(plane: Sequence[Sample], rival: Sequence[Sample]) -> float:
    """Median over the rounds of the plane's speed over the rival's in the same round."""
    return median([theirs.seconds / ours.seconds for ours, theirs in zip(plane, rival, strict=True)])


def over_raw_tcp(samples: Samples) -> dict[str, dict[int, float]]:
    """Speed of every mover over raw TCP's, by tokens."""
    out: dict[str, dict[int, float]] = {}
    for blocks, movers in samples.items():
        for name, taken in movers.items():
            if "raw_tcp" in movers and name != "raw_tcp":
                out.setdefault(name, {})[blocks * BLOCK_TOKENS] = round(ratio(taken, movers["raw_tcp"]), 3)
    return out


def marks(samples: Samples) -> dict[str, Any]:
    """The marks whose movers ran; each is the worst of the sizes that count."""
    out: dict[str, Any] = {}
    large = [movers for blocks, movers in samples.items() if blocks >= MARKED_FROM]
    for name, plane, rival, at_least in RATIOS:
        ratios = [ratio(m[plane], m[rival]) for m in large if plane in m and rival in m]
        if ratios:
            out[name] = mark(min(ratios), at_least, "ratio", at_most=False)
    table = [entry for entry in rows(samples) if entry["tokens"] >= MARKED_FROM * BLOCK_TOKENS]
    if grpc := [entry["gb_s"] for entry in table if entry["mover"] == "grpc"]:
        out["grpc_gb_s"] = mark(min(grpc), GRPC_GB_S, "GB/s", at_most=False)
    sides = ("source_cpu_s_per_gb", "target_cpu_s_per_gb")
    if cpu := [entry[side] for entry in table if entry["mover"] == "socket" for side in sides]:
        out["socket_cpu_s_per_gb"] = mark(max(cpu), SOCKET_CPU_S_PER_GB, "CPU s/GB", at_most=True)
    return out
