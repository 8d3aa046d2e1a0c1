"""A worker's speed: measured at its start, kept over restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from headway.core.fit import ForwardWork, Timing
from headway.core.timings import Timings
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
    timings = Timings(4)
    for threads, token_s in ((4, 1e-3), (1, 3e-3)):
        for tokens in (100, 1000):
            timings.use(threads).observe(ForwardWork([(tokens, 0)]), tokens * token_s)
    TimingFile(str(path), "here").save(timings)
    again = Timings(4)
    assert TimingFile(str(path), "here").load(again)
    for threads in (4, 1):
        assert again.use(threads).predictor == timings.use(threads).predictor
    assert not TimingFile(str(path), "elsewhere").load(Timings(4))
    assert [entry.name for entry in path.parent.iterdir()] == ["timing.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "Expecting value"),
        ("{}", "identity"),
        ("[]", "list indices"),
        ('{"identity": "here", "timing": {"prefill": [1], "step": [1]}}', "an earlier version wrote it"),
        ('{"identity": "here", "timings": {}}', "no timings of 4 threads"),
        ('{"identity": "here", "timings": {"4": {"prefill": [1], "step": [1]}}}', "21 numbers"),
    ],
)
def test_a_file_that_is_none_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, reason: str
) -> None:
    path = tmp_path / "timing.json"
    path.write_text(content)
    timings = Timings(4)
    before = timings.state()
    assert not TimingFile(str(path), "here").load(timings)
    assert path.read_text() == content
    assert timings.state() == before
    assert [(record.levelname, reason in record.message) for record in caplog.records] == [("WARNING", True)]


def test_no_file_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    timings = Timings()
    timings.now.observe(ForwardWork([(100, 0)]), 0.1)
    TimingFile("", "here").save(timings)
    assert not TimingFile("", "here").load(timings)
    TimingFile(str(tmp_path / "new.json"), "here").save(Timings())
    assert not list(tmp_path.iterdir()), "nothing was learned, so nothing is kept"
    TimingFile("/proc/nowhere/file", "here").save(timings)


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "timing.json"
    timings = Timings()
    timings.now.observe(ForwardWork((), 4, 100), 0.01)
    timings.now.observe(ForwardWork([(100, 0)]), 0.1)
    TimingFile(str(path), "here").save(timings)
    assert json.loads(path.read_text())["identity"] == "here"
