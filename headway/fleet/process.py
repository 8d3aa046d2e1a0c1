"""One service as a child process: started, watched until it listens, signalled, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import headway
from headway.fleet import shim

TAIL_LINES = 20
POLL_S = 0.02


class FleetError(Exception):
    """A process of the fleet failed; the message has the tail of its log."""


@dataclass(frozen=True)
class Place:
    """Where a node's processes run: the address that they listen on, and what comes before their command (nsenter, …).

    What comes before must become the process (exec), not start it.
    """

    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


LOOPBACK = Place()


class ServiceProcess:
    """`python -m services.SERVICE.server` with flags and a port file; the port stays the same over restarts.

    Must be started from a thread that lives as long as the process should: the kernel kills it with that thread.
    """

    def __init__(
        self,
        name: str,
        service: str,
        flags: Sequence[str],
        env: Mapping[str, str],
        run_dir: Path,
        port: int,
        place: Place = LOOPBACK,
    ) -> None:
        self.name = name
        self.port = port
        self.log = run_dir / f"{name}.log"
        self.started_s = 0.0
        self._service = service
        self._place = place
        self._flags = list(flags)
        self._env = dict(env)
        self._port_file = run_dir / f"{name}.port"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process now or last running."""
        if self._process is None:
            raise FleetError(f"{self.name} has not been started")
        return self._process.pid

    @property
    def address(self) -> str:
        return f"{self._place.host}:{self.port}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns at once; see `wait_listening`. Nothing happens when it runs already."""
        if self.alive:
            return
        self._port_file.unlink(missing_ok=True)
        command = [
            *self._place.prefix,
            sys.executable,
            "-I",
            "-S",
            shim.__file__,
            str(os.getpid()),
            sys.executable,
            "-P",
            "-m",
        ]
        command += [f"services.{self._service}.server", "--host", self._place.host]
        command += ["--port", str(self.port), "--port-file", str(self._port_file), *self._flags]
        with self.log.open("ab") as log:
            # A group of its own: Ctrl-C in a terminal reaches only the parent, which stops its children in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), process_group=0
            )
        self.started_s = time.monotonic()

    def wait_listening(self, deadline_s: float) -> None:
        """Until it has written its port. Raises FleetError when it ends, or at `deadline_s` of time.monotonic."""
        while True:
            self.check()
            text = self._port_file.read_text() if self._port_file.exists() else ""
            if text.endswith("\n"):
                self.port = int(text)
                return
            if time.monotonic() > deadline_s:
                raise FleetError(f"{self.name} did not start in time; {self.tail()}")
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raises FleetError when it has ended."""
        if not self.alive:
            status = self._process.returncode if self._process else None
            how = f"was killed by signal {-status}" if status and status < 0 else f"ended with status {status}"
            raise FleetError(f"{self.name} {how}; {self.tail()}")

    def signal(self, number: signal.Signals) -> None:
        """Nothing happens when it has ended."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait_ended(self, deadline_s: float) -> None:
        """Until it has ended; at `deadline_s` of time.monotonic it is killed."""
        if self._process is None:
            return
        try:
            self._process.wait(max(deadline_s - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if self.log.exists() else []
        return "\n".join([f"the end of {self.log}:", *(f"  {line}" for line in lines)])

    def _environment(self) -> dict[str, str]:
        """The child finds the same headway and services as this process, whatever its working directory holds."""
        root = str(Path(headway.__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **self._env}
