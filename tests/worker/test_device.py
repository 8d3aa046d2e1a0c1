"""A worker on a device (NumPy's): it shares its device with the slab or does not start, and ends with its kvstore."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.fleet.process import ServiceProcess
from headway.slab.device import DeviceError, open_device
from tests.kvstore.rig import kvstore, running

NOWHERE = "127.0.0.1:1"


def worker(run_dir: Path, store: ServiceProcess, *flags: str) -> ServiceProcess:
    settings = ["--engine", "sim", "--kvstore", store.address, "--routers", NOWHERE, *flags]
    return ServiceProcess("worker", "prefill", settings, {}, run_dir, 0)


def ended(process: ServiceProcess) -> tuple[int, str]:
    """Exit status and last line of the log, once it has ended by itself."""
    assert process._process is not None
    status = process._process.wait(20)
    return status, process.log.read_text().strip().splitlines()[-1]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ServiceProcess]:
    with running(kvstore(tmp_path, 1 << 20, "--device", "numpy:0")) as process:
        yield process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_kvstore(tmp_path: Path, store: ServiceProcess, number: int) -> None:
    process = worker(tmp_path, store, "--device", "numpy:0")
    process.start()
    try:
        deadline_s = time.monotonic() + 20
        while not process.log.exists() or "event=attached" not in process.log.read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        store.signal(number)
        status, line = ended(process)
        assert status == os.EX_TEMPFAIL
        wanted = "the kvstore went away, and the slab on numpy:0 with it; start this worker again"
        assert line == f"headway-prefill: {wanted}"
        # A clean end of the kvstore waited for this one's.
        store.wait_ended(time.monotonic() + 2)
        assert not store.alive
    finally:
        process.signal(signal.SIGKILL)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("cpu", "lies on numpy:0, this worker computes on the CPU: set both --device alike"),
        ("numpy:1", "lies on numpy device host:0, this worker computes on numpy:1 (host:1): set both --device alike"),
        ("numpy:2", "there is no numpy:2: this process sees 2 such devices, counted from 0"),
        ("cuda:0", "the simulated engine computes on the CPU"),
    ],
)
def test_a_worker_elsewhere_does_not_start(tmp_path: Path, store: ServiceProcess, device: str, sentence: str) -> None:
    process = worker(tmp_path, store, "--device", device)
    process.start()
    try:
        status, line = ended(process)
    finally:
        process.signal(signal.SIGKILL)
    assert status in (1, 2)
    assert line.endswith(sentence)


def test_a_gpu_that_cannot_be_used_is_one_sentence(tmp_path: Path, store: ServiceProcess) -> None:
    try:
        open_device("cuda:0")
    except DeviceError as error:
        sentence = str(error)
    else:
        pytest.skip("there is a GPU")
    process = worker(tmp_path, store, "--device", "cuda:0", "--engine", "auto")
    process.start()
    try:
        assert ended(process) == (1, f"headway-prefill: {sentence}")
    finally:
        process.signal(signal.SIGKILL)
