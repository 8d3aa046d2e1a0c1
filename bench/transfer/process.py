"""A child process that is asked one thing at a time, in lines of JSON, and ended by its own pid."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from bench.transfer.contract import MoverError, process_cpu_s

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 60.0
DIE_WITH_US = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG survives the exec
os.execv(sys.argv[1], sys.argv[1:])
"""


class Side:
    """One side of a pair: `python -m bench.transfer.sides.MODULE`, run with the python that has what it needs."""

    def __init__(
        self, python: str, module: str, config: dict[str, Any], fds: list[int], env: dict[str, str] | None = None
    ) -> None:
        self.name = f"{module} {config.get('role', '')}".strip()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close())
        self._process = subprocess.Popen(
            [python, "-m", f"bench.transfer.sides.{module}", json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            pass_fds=fds,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        )

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the process has used so far."""
        try:
            return process_cpu_s(self._process.pid)
        except OSError:
            raise self._failed("has ended") from None

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question. Raises MoverError with the end of the child's log when none comes."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("has ended") from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of the child; the first one says that it is ready."""
        line = self._read_line()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failed(reply["error"])
        return reply

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor, line, deadline = self._process.stdout.fileno(), b"", time.monotonic() + ANSWER_S
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._failed(f"did not answer for {ANSWER_S:.0f} s")
            piece = os.read(descriptor, 65536)
            if not piece:
                raise self._failed("has ended")
            line += piece
        return line

    def _failed(self, what: str) -> MoverError:
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-4:]
        return MoverError(f"{self.name}: {what}" + (f" ({' | '.join(tail)})" if tail else ""))

    def pause(self) -> None:
        """Stop its threads, all of them, until `resume`: a peer that polls must not take the others' cores."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.resume()
        end(self._process)
        self._log.close()


def start_server(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a program that is not ours; it dies with us, however we die."""
    nothing = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_US, *command], stdin=nothing, stdout=nothing, stderr=nothing
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started: close its input, then TERM, then KILL; always reaped."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    for grace, stop in ((2.0, process.terminate), (3.0, process.kill)):
        try:
            process.wait(grace)
            return
        except subprocess.TimeoutExpired:
            stop()
    process.wait()
