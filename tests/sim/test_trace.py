"""Trace files and made-up traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from headway.sim.trace import Trace, TraceError, TraceRequest, read_trace
from headway.sim.workload import WORKLOADS, Workload, make_trace, scaled

ROWS = [
    {"timestamp": 2000, "input_length": 1000, "output_length": 5, "hash_ids": [0, 7]},
    {"timestamp": 0, "input_length": 600, "output_length": 0, "hash_ids": [0, 3]},
]


def test_mooncake_files_plain_and_gzipped(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    trace = read_trace(tmp_path / "a.jsonl")
    assert trace == read_trace(tmp_path / "a.jsonl.gz")
    first, second = trace.requests
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 600, 1)
    assert (second.arrival_s, second.prompt_tokens, second.output_tokens) == (2.0, 1000, 5)
    assert first.keys[0] == second.keys[0] != second.keys[1]
    assert (trace.name, trace.block_size, trace.span_s) == ("a", 512, 2.0)


def test_azure_files(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,1,0\n"
    )
    first, second = read_trace(path).requests
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens, first.keys) == (0.0, 4808, 10, ())
    assert second.arrival_s == pytest.approx(0.052)
    assert second.output_tokens == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"timestamp": 1}', "no trace in the format that its name says .KeyError: 'input_length'"),
        ("a.jsonl", "not json", "no trace in the format"),
        ("a.csv", "A,B\n1,2\n", "no trace in the format"),
        ("a.jsonl", "", "has no requests"),
        ("a.jsonl.gz", "not gzip", "cannot be read"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TraceError, match=sentence):
        read_trace(tmp_path / name)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "missing.jsonl")


def test_faster_first_and_every() -> None:
    keys = [b"root", b"a"], [b"root", b"b"], [b"root", b"a", b"c"], [b"root"], [b"root", b"d"]
    trace = Trace("t", 512, [TraceRequest(at * 2.0, 600, 1, key) for at, key in enumerate(keys)])
    assert [r.arrival_s for r in trace.faster(2).requests] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(trace.first(2)) == 2
    # Sessions: a, b, a again, one by itself, d.
    assert [r.keys for r in trace.every(2).requests] == [keys[0], keys[2], keys[3]]


def test_a_workload_is_what_its_parameters_say() -> None:
    workload = Workload("w", sessions_per_s=2.0, seconds=500.0, turns=3.0, pause_s=1.0)
    trace = make_trace(workload)
    assert trace == make_trace(workload)
    assert trace != make_trace(workload, seed=1)
    assert len(trace) / 500 == pytest.approx(6.0, rel=0.15)
    assert all(0 <= r.arrival_s < 500 for r in trace.requests)
    assert [r.arrival_s for r in trace.requests] == sorted(r.arrival_s for r in trace.requests)
    assert all(len(r.keys) == -(-r.prompt_tokens // 512) for r in trace.requests)
    roots = {r.keys[0] for r in trace.requests}
    assert len(roots) <= workload.system_prompts
    seen: set[bytes] = set()
    later_turns = sum(bool(seen & {r.keys[-2]}) or bool(seen.update(r.keys)) for r in trace.requests)  # type: ignore[func-returns-value]
    assert later_turns > 0.3 * len(trace)


def test_a_spike_comes_when_it_should() -> None:
    trace = make_trace(Workload("s", 1.0, 300.0, turns=1.0, spike=10.0, spike_at_s=100.0, spike_s=20.0))
    during = sum(100 <= r.arrival_s < 120 for r in trace.requests)
    before = sum(80 <= r.arrival_s < 100 for r in trace.requests)
    assert during > 5 * before
    assert during == pytest.approx(200, rel=0.25)


def test_rate_and_length_can_be_set() -> None:
    workload = scaled(WORKLOADS["chat"], rate=8.0, seconds=100.0)
    assert (workload.sessions_per_s, workload.seconds) == (2.0, 100.0)
    assert scaled(WORKLOADS["chat"], None, None) == WORKLOADS["chat"]
