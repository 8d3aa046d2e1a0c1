"""A worker's speed: measured at its start, kept over restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from headway.core.fit import ForwardWork, Timing
from headway.engine.simulated import Latency, SimulatedEngine, simulated_card
from headway.worker.measure import TimingFile, alone, measure


def test_a_short_measurement_finds_the_speed() -> None:
    engine = SimulatedEngine(simulated_card(), Latency((2e-3, 2e-5, 0.0), (3e-3, 1e-3, 0.0)))
    timing = Timing()
    measure(engine, timing, 2.0)
    # Never sooner than the engine sleeps; how much later is the machine's affair.
    assert 0.02 < timing.predictor.prefill_s(1000, 0) < 0.1
    assert 0.006 < timing.predictor.step_s(4, 1000) < 0.05
    assert timing.prefill.count
    assert timing.step.count


def test_a_slow_engine_is_not_measured_for_long() -> None:
    engine = SimulatedEngine(simulated_card(), Latency((0.3, 0.0, 0.0), (0.3, 0.0, 0.0)))
    timing = Timing()
    measure(engine, timing, 0.1)
    assert (timing.prefill.count, timing.step.count) == (1, 0)


def test_workers_measure_themselves_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    started = time.monotonic()
    with alone():
        assert time.monotonic() - started < 0.5
        # Another one waits, though not for ever.
        with alone(0.2):
            assert time.monotonic() - started >= 0.2
    started = time.monotonic()
    with alone():
        assert time.monotonic() - started < 0.5


def test_what_was_learned_is_kept_for_the_same_model_and_place(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "timing.json"
    timing = Timing()
    for tokens in (100, 1000):
        timing.observe(ForwardWork([(tokens, 0)]), tokens * 1e-3)
    TimingFile(str(path), "here").save(timing)
    again = Timing()
    assert TimingFile(str(path), "here").load(again)
    assert again.predictor == timing.predictor
    assert not TimingFile(str(path), "elsewhere").load(Timing())
    assert [entry.name for entry in path.parent.iterdir()] == ["timing.json"]


@pytest.mark.parametrize(
    "content", ["not json", "{}", '{"identity": "here", "timing": {"prefill": [1], "step": [1]}}', "[]"]
)
def test_a_file_that_is_none_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "timing.json"
    path.write_text(content)
    assert not TimingFile(str(path), "here").load(Timing())
    assert path.read_text() == content


def test_no_file_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    timing = Timing()
    timing.observe(ForwardWork([(100, 0)]), 0.1)
    TimingFile("", "here").save(timing)
    assert not TimingFile("", "here").load(timing)
    TimingFile(str(tmp_path / "new.json"), "here").save(Timing())
    assert not list(tmp_path.iterdir()), "nothing was learned, so nothing is kept"
    TimingFile("/proc/nowhere/file", "here").save(timing)


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "timing.json"
    timing = Timing()
    timing.observe(ForwardWork((), 4, 100), 0.01)
    timing.observe(ForwardWork([(100, 0)]), 0.1)
    TimingFile(str(path), "here").save(timing)
    assert json.loads(path.read_text())["identity"] == "here"
