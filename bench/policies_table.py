"""The published rows that `bench.policies` reproduces before any ratio counts, and how near it comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS = ("mean_s", "p50_s", "p90_s", "p99_s", "hit", "in_slo", "load", "itl_p99_s")
# policy → load → mean, p50, p90, p99 TTFT in seconds, hit ratio, share in SLO.
TABLE: dict[str, dict[float, tuple[float, ...]]] = {
    "round-robin": {0.7: (12.0, 6.6, 32, 56, 0.09, 0.42), 0.9: (73, 66, 144, 207, 0.09, 0.06)},
    "least-loaded": {0.7: (3.1, 2.1, 6.9, 18, 0.09, 0.75), 0.9: (42, 42, 60, 76, 0.09, 0.02)},
    "sglang": {0.7: (3.6, 1.6, 9.9, 27, 0.29, 0.76), 0.9: (6.9, 3.0, 20, 43, 0.29, 0.58)},
    "llm-d": {0.7: (2.9, 1.3, 7.1, 25, 0.29, 0.82), 0.9: (4.1, 2.1, 10, 28, 0.29, 0.69)},
    "reference": {0.7: (2.1, 1.2, 4.9, 15.9, 0.22, 0.88), 0.9: (4.1, 3.0, 9.1, 18.5, 0.20, 0.58)},
    "reference-wspt-1": {0.7: (1.9, 1.0, 4.1, 16.1, 0.21, 0.96), 0.9: (2.9, 1.7, 6.0, 23.1, 0.18, 0.84)},
    "mooncake": {0.7: (1.6, 0.8, 3.6, 15.4, 0.29, 0.96), 0.9: (2.3, 1.3, 5.1, 16.1, 0.29, 0.85)},
    "headway": {0.7: (1.55, 0.64, 3.5, 15.6, 0.29, 0.99), 0.9: (1.83, 0.82, 4.2, 16.7, 0.29, 0.98)},
}
WITHIN = 0.15


def reproduced(runs: Mapping[float, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Per row and load: the largest deviation of the four TTFTs from the published ones, and of which.

    `means_within`: share of the means that are within 15 %; `outside`: every figure that is not.
    """
    rows: dict[str, Any] = {}
    outside: list[str] = []
    means: list[bool] = []
    for policy, by_load in TABLE.items():
        for load, published in by_load.items():
            off = {
                head: runs[load][policy][head] / value - 1 for head, value in zip(HEADS[:4], published[:4], strict=True)
            }
            worst = max(off, key=lambda head: abs(off[head]))
            rows[f"{policy} at {load:.0%}"] = {
                "worst": worst,
                "off": round(off[worst], 3),
                "mean": round(off["mean_s"], 3),
            }
            means.append(abs(off["mean_s"]) <= WITHIN)
            outside += [
                f"{policy} at {load:.0%}: {head} {value:+.0%}" for head, value in off.items() if abs(value) > WITHIN
            ]
    return {"means_within": sum(means) / len(means), "outside": outside, "rows": rows}
