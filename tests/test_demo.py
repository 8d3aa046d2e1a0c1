"""The demo and `headway up` as a user runs them, with simulated engines: they work, and leave nothing running."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from functools import partial

import pytest

from headway import demo
from headway.cli import main
from headway.client import Client
from tests.fake_router import FakeRouter, serve
from tests.test_fleet import gone, wait_for

SIM = ["--engine", "sim", "--model", "sim"]


def start(module: str, *flags: str) -> subprocess.Popen[str]:
    """Ctrl-C ends it also where the shell that runs these tests has told its children to ignore it."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The output so far, up to and with the line that holds `text`."""
    lines: list[str] = []
    assert process.stdout is not None
    while not lines or text not in lines[-1]:
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
    return "".join(lines)


def test_every_prompt_is_shown_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    router = FakeRouter()
    with serve(router) as address, Client(address) as client:
        demo._prompts(client, 8)
    out = capsys.readouterr().out
    assert out.count("Hello, wörld!") == 7
    assert out.count("TTFT ") == 7
    turns = [len(request.chat.messages) for request in router.requests]
    assert turns == [1, 3, 1, 1, 1, 1, 1]
    assert len(demo.station_log().split()) > 800


def test_the_demo_runs_and_stops_everything() -> None:
    process = start("headway.demo", *SIM, "--max-tokens", "4")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("TTFT ") == 7
    assert output.count("handoff 0 bytes") == 7
    pids = [int(pid) for pid in re.findall(r"process (\d+) at", output)]
    assert len(pids) == 4
    assert all(map(gone, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_stops_everything_when_interrupted(number: signal.Signals) -> None:
    process = start("headway.demo", *SIM, "--max-tokens", "100000")
    pids = [int(pid) for pid in re.findall(r"process (\d+) at", read_until(process, "a short chat"))]
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert len(pids) == 4
    wait_for(lambda: all(map(gone, pids)))


def test_up_serves_until_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    process = start("headway.cli", "up", *SIM, "--mixed", "1", "--port", "0")
    found = re.search(r"--address (\S+)", read_until(process, "try: headway generate"))
    assert found
    assert main(["generate", "hello", "--max-tokens", "3", "--address", found[1]]) == 0
    assert main(["fleet", "--address", found[1]]) == 0
    assert "mixed-0" in capsys.readouterr().out
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in output) == (0, False), output
