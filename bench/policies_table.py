"""The published rows that `bench.policies` reproduces before any ratio counts, and how near it comes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from headway.sim.summary import Summary

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


def reproduced(runs: Mapping[float, Mapping[str, Sequence[Summary]]]) -> dict[str, Any]:
    """Per row and load: how far the four TTFTs (means over the seeds) are from the published ones.

    `means_within`, `within`: share of the means, and of all figures, that are within 15 %; `outside`: every figure that
    is not, with what single seeds have, since a published figure may be of a single one.
    """
    rows: dict[str, dict[str, float]] = {}
    outside: list[str] = []
    for policy, by_load in TABLE.items():
        for load, published in by_load.items():
            row = rows[f"{policy} at {load:.0%}"] = {}
            for head, value in zip(HEADS[:4], published[:4], strict=True):
                seeds = [getattr(run, head) / value - 1 for run in runs[load][policy]]
                row[head] = round(statistics.fmean(seeds), 3)
                if abs(row[head]) > WITHIN:
                    span = f"seeds {min(seeds):+.0%} to {max(seeds):+.0%}"
                    outside.append(f"{policy} at {load:.0%}: {head} {row[head]:+.0%} ({span})")
    offs = [off for row in rows.values() for off in row.values()]
    return {
        "means_within": _share_within([row["mean_s"] for row in rows.values()]),
        "within": _share_within(offs),
        "outside": outside,
        "rows": rows,
    }


def _share_within(offs: Sequence[float]) -> float:
    return round(sum(abs(off) <= WITHIN for off in offs) / len(offs), 3)
