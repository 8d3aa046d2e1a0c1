"""Redis as a store between two processes: redis-server on loopback, keeping everything in memory, and redis-py."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import time

from bench.transfer.contract import MoverError, SkipError, process_cpu_s
from bench.transfer.pair import Candidate, PairMover
from bench.transfer.peers import version_of
from bench.transfer.process import Side, end, start_server
from bench.transfer.slabs import Slabs

BATCHES = (4, 1, 16)  # blocks
IO_THREADS = 2
START_S = 5.0


class Redis(PairMover):
    """Every byte crosses the server twice: its CPU is counted apart, as `cpu_between_s`."""

    name = "redis"

    def __init__(self, slabs: Slabs, python: str | None) -> None:
        super().__init__(slabs, python)
        self._servers: dict[int, tuple[subprocess.Popen[bytes], int]] = {}

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(config=(("io_threads", threads),), question=(("batch", batch),))
            for threads, batch in itertools.product((1, IO_THREADS), BATCHES)
        ]

    def open(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise SkipError("redis-server is not installed (Debian package redis-server)")
        client = version_of(self.python, "redis")
        server = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
        self.setting["version"] = f"{client}, server {server}, hiredis {_hiredis(self.python)}"
        for threads in (1, IO_THREADS):
            self._servers[threads] = _start_server(binary, threads)
        super().open()

    def start(self, candidate: Candidate) -> tuple[Side, Side]:
        _, port = self._servers[dict(candidate.config)["io_threads"]]
        target = self.side("redis", "target", candidate, port=port)
        return self.side("redis", "source", candidate, port=port), target

    def cpu_between_s(self) -> float:
        return sum(process_cpu_s(process.pid) for process, _ in self._servers.values())

    def close(self) -> None:
        super().close()
        for process, _ in self._servers.values():
            end(process)
        self._servers = {}


def _hiredis(python: str) -> str:
    try:
        return version_of(python, "hiredis").partition("==")[2]
    except SkipError:
        return "absent"


def _start_server(binary: str, io_threads: int) -> tuple[subprocess.Popen[bytes], int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"--bind 127.0.0.1 --port {port} --save --appendonly no --io-threads {io_threads}".split()
    options.insert(options.index("--save") + 1, "")
    process = start_server([binary, *options])
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process, port
        except OSError:
            time.sleep(0.02)
    end(process)
    raise MoverError("redis-server does not accept connections")
