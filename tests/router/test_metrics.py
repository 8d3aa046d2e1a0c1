"""What Prometheus gets from a router."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headway.runtime import metrics
from headway.runtime.errors import HeadwayError
from headway.runtime.metrics import Exporter, Figure
from services.router.figures import figures
from tests.router.fakes import Rig, until
from tests.router.test_server import start


def parsed(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """(name, labels) → value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text: str = answer.read().decode()
    return text


async def test_figures_are_read_on_the_loop_when_they_are_asked_for() -> None:
    loop, values = asyncio.get_running_loop(), [1.0]

    def read() -> list[Figure]:
        assert asyncio.get_running_loop() is loop
        return [Figure("load", "of each", values[0], {"of": "a"}), Figure("load", "of each", 7.0, {"of": "b"})]

    exporter = Exporter("127.0.0.1", 0, read)
    try:
        for value in (1.0, 2.5):
            values[0] = value
            found = parsed(await asyncio.to_thread(scrape, exporter.port))
            assert found == {("load", frozenset({("of", "a")})): value, ("load", frozenset({("of", "b")})): 7.0}
        with pytest.raises(HeadwayError, match=f"cannot serve metrics on 127.0.0.1:{exporter.port}: .*--metrics-port"):
            Exporter("127.0.0.1", exporter.port, read)
    finally:
        await exporter.close()
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(scrape, exporter.port)


async def test_a_loop_that_does_not_answer_fails_the_scrape_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "READ_S", 0.01)
    gate = asyncio.Event()

    class Slow(metrics._OnLoop):
        async def _now(self) -> list[Figure]:
            await gate.wait()
            return []

    monkeypatch.setattr(metrics, "_OnLoop", Slow)
    exporter = Exporter("127.0.0.1", 0, list)
    try:
        with pytest.raises((urllib.error.URLError, OSError)):
            await asyncio.to_thread(scrape, exporter.port)
        gate.set()
        assert await asyncio.to_thread(scrape, exporter.port) == ""
    finally:
        await exporter.close()


async def test_a_router_tells_the_errors_of_every_predictor() -> None:
    async with Rig() as rig:
        p0 = await rig.add("p0")
        await rig.add("d0")
        fleet = rig.service.fleet
        p0.status.prefill_error, p0.status.step_error = 0.25, 0.5
        p0.status.waiting_sequences, p0.status.running_sequences = 3, 7
        await until(lambda: fleet.workers["p0"].status.step_error == 0.5)
        store = next(iter(fleet.stores))
        link = fleet.links.between(store, "b")
        link.count, link.error, link.bytes_per_s = 4, 0.125, 2e9
        link.free_s = time.monotonic() + 100
        exporter = Exporter("127.0.0.1", 0, lambda: figures(fleet, 5))
        try:
            found = parsed(await asyncio.to_thread(scrape, exporter.port))
        finally:
            await exporter.close()
    prefill = frozenset({("worker", "p0"), ("role", "prefill")})
    decode = frozenset({("worker", "d0"), ("role", "decode")})
    between = frozenset({("source", store), ("destination", "b")})
    assert found["headway_worker_prefill_error_ratio", prefill] == 0.25
    assert found["headway_worker_step_error_ratio", prefill] == 0.5
    assert found["headway_worker_waiting_sequences", prefill] == 3
    assert found["headway_worker_running_sequences", prefill] == 7
    assert found["headway_worker_step_error_ratio", decode] == 0.0
    assert found["headway_link_error_ratio", between] == 0.125
    assert found["headway_link_bytes_per_second", between] == 2e9
    assert 60 < found["headway_link_backlog_seconds", between] <= 100
    assert found["headway_requests_in_flight", frozenset()] == 5


def test_a_router_serves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    monkeypatch.setenv("HEADWAY_ROUTER_METRICS_PORT", str(port))
    process, _ = start(tmp_path / "port")
    try:
        assert parsed(scrape(port)) == {("headway_requests_in_flight", frozenset()): 0.0}
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
