"""Restarts services that die, on their old port, with growing pauses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from headway.fleet.process import ServiceProcess

POLL_S = 0.2
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
STABLE_S = 30.0


class Supervisor:
    """Watches from a thread of its own until `stop`. A service that ran for 30 s starts again with the first pause."""

    def __init__(self, processes: Iterable[ServiceProcess], launch: Callable[[ServiceProcess], None]) -> None:
        self._processes = list(processes)
        self._launch = launch
        self._pauses: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet-supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """After this nothing is restarted any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            for process in self._processes:
                if not process.alive:
                    self._revive(process)

    def _revive(self, process: ServiceProcess) -> None:
        now = time.monotonic()
        due = self._due.get(process.name)
        if due is None:
            lived = now - process.started_s
            pause = FIRST_PAUSE_S if lived > STABLE_S else self._pauses.get(process.name, FIRST_PAUSE_S)
            self._pauses[process.name] = min(pause * 2, LONGEST_PAUSE_S)
            self._due[process.name] = now + pause
        elif now >= due:
            del self._due[process.name]
            self._launch(process)
