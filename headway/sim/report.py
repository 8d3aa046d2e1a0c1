"""The report of a simulation: a table, a picture, JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headway.sim.scenario import Outcome
from headway.sim.summary import Summary, waiting_over_time

HEADS = ["policy", "mean", "p50", "p90", "p99", "ITL p99", "hit", "in SLO", "load", "refused"]


def table_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """Cells beside HEADS: TTFT in seconds, ITL in milliseconds, shares in percent."""
    return [
        [
            s.policy,
            *(f"{value:.2f} s" for value in (s.mean_s, s.p50_s, s.p90_s, s.p99_s)),
            f"{s.itl_p99_s * 1e3:.0f} ms",
            *(f"{value:.0%}" for value in (s.hit, s.in_slo, s.load)),
            str(s.refused),
        ]
        for s in summaries
    ]


def write_json(path: Path, settings: Mapping[str, Any], summaries: Mapping[float, Sequence[Summary]]) -> None:
    """{"settings", "runs": [{"speed", policy, …}]}; see Summary for the fields. Raises OSError."""
    runs = [{"speed": speed, **summary.as_dict()} for speed, rows in summaries.items() for summary in rows]
    path.write_text(json.dumps({"settings": settings, "runs": runs}, indent=2) + "\n")


def write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A row for each request and policy; seconds from the trace's start, empty where it never came. Raises OSError."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["policy", "arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "pulled_tokens", "worker",
             "started_s", "first_token_s", "finished_s"]
        )  # fmt: skip
        for outcome in outcomes:
            for s in outcome.sequences:
                request = s.request
                rows.writerow(
                    [outcome.policy, request.arrival_s, request.prompt_tokens, request.output_tokens, s.cached,
                     s.pulled, s.worker, s.started_s, s.first_token_s, s.finished_s]
                )  # fmt: skip


def draw(path: Path, title: str, outcomes: Sequence[Outcome], summaries: Mapping[float, Sequence[Summary]]) -> bool:
    """Four panels; those of one speed are of `outcomes`. False when matplotlib is not installed. Raises OSError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    (ttft, queue), (hits, goodput) = figure.subplots(2, 2)
    for outcome in outcomes:
        times = sorted(s.ttft_s for s in outcome.sequences if s.ttft_s is not None)
        shares = [(at + 1) / len(times) for at in range(len(times))]
        ttft.plot(times, shares, label=outcome.policy)
        queue.step(*waiting_over_time(outcome.sequences), where="post", linewidth=0.8)
    ttft.set(title="time to first token", xlabel="seconds", ylabel="share of requests", xscale="log", ylim=(0, 1))
    ttft.legend(fontsize="small")
    queue.set(title="requests waiting", xlabel="seconds", ylim=(0, None))
    _draw_by_speed(hits, goodput, summaries)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _draw_by_speed(hits: Any, goodput: Any, summaries: Mapping[float, Sequence[Summary]]) -> None:
    """Lines over the requests that come a second, or bars where the trace ran at one speed only."""
    runs = list(summaries.values())
    policies = [summary.policy for summary in runs[0]]
    panels = ((hits, "share of prompt tokens not computed", "hit"), (goodput, "requests in SLO a second", "goodput"))
    for axes, name, field in panels:
        axes.set(title=name)
        if len(runs) == 1:
            values = [getattr(summary, field) for summary in runs[0]]
            axes.barh(policies[::-1], values[::-1], color=[f"C{at}" for at in range(len(values))][::-1])
            continue
        for at, policy in enumerate(policies):
            rates = [rows[at].rate for rows in runs]
            axes.plot(rates, [getattr(rows[at], field) for rows in runs], marker="o", label=policy)
        axes.set(xlabel="requests a second", ylim=(0, None))
