"""iperf3 on loopback, beside our own raw TCP: what another, well-known sender in C reaches here.

It measures a rate, so it always sends enough for one; a sample is that rate scaled to the size that was asked for.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from typing import Any

from bench.transfer.contract import BLOCK_BYTES, Mover, MoverError, Sample, SkipError
from bench.transfer.process import end, start_server

STREAMS = (1, 2, 4)
PIECES = ("256K", "1M")  # 1 MiB is the most that it takes
LEAST_BYTES = 256 << 20
RUN_S = 30.0
START_S = 5.0


class Iperf3(Mover):
    """One server for all runs and a client a run; CPU shares are iperf3's own account."""

    name = "iperf3"
    least_blocks = 64

    def __init__(self) -> None:
        self.setting = {}
        self.best = (1, "1M")
        self._server: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        binary = shutil.which("iperf3")
        if binary is None:
            raise SkipError("not installed (Debian package iperf3)")
        self._binary = binary
        self.setting["version"] = subprocess.run([binary, "--version"], capture_output=True, text=True).stdout.split()[
            1
        ]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        command = [binary, "-s", "-B", "127.0.0.1", "-p", str(self._port)]
        self._server = start_server(command)
        self._wait_ready()

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()  # it has no input whose end it would see
            end(self._server)
            self._server = None

    def tune(self, sizes: list[int]) -> None:
        tried = {(streams, piece): self._run(streams, piece, LEAST_BYTES) for streams in STREAMS for piece in PIECES}
        rates = {way: sent["sum_received"]["bits_per_second"] / 8e9 for way, sent in tried.items()}
        self.best = max(rates, key=lambda way: rates[way])
        self.setting["best"] = {"streams": self.best[0], "piece": self.best[1]}
        self.setting["tried"] = [{"streams": s, "piece": p, "gb_s": round(gb, 3)} for (s, p), gb in rates.items()]

    def move(self, blocks: int) -> Sample:
        size = blocks * BLOCK_BYTES
        sent = self._run(*self.best, max(size, LEAST_BYTES))
        seconds = size * 8 / sent["sum_received"]["bits_per_second"]
        shares = sent["cpu_utilization_percent"]
        return Sample(seconds, seconds * shares["host_total"] / 100, seconds * shares["remote_total"] / 100)

    def verify(self, blocks: int) -> None:
        """Nothing to compare: it sends its own bytes, and throws them away."""

    def _run(self, streams: int, piece: str, size: int) -> dict[str, Any]:
        """The `end` part of a client's report."""
        options = f"-c 127.0.0.1 -p {self._port} -J -n {size} -P {streams} -l {piece}".split()
        run = subprocess.run([self._binary, *options], capture_output=True, text=True, timeout=RUN_S, check=False)
        report: dict[str, Any] = json.loads(run.stdout or "{}")
        if run.returncode or "sum_received" not in report.get("end", {}):
            raise MoverError(f"iperf3: {report.get('error', run.stderr.strip())}")
        sent: dict[str, Any] = report["end"]
        return sent

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                self._run(1, "256K", 1 << 20)
                return
            except MoverError:
                time.sleep(0.05)
        raise MoverError("iperf3: its server does not answer")
