"""Starts, watches and stops the processes of a local fleet."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from headway.client import Client, FleetView, HeadwayClientError
from headway.fleet.process import FleetError, ServiceProcess
from headway.fleet.slabs import remove_slabs, remove_stale_slabs, slab_name
from headway.fleet.spec import FleetSpec
from headway.fleet.supervise import Supervisor

START_S = 120.0
STOP_S = 5.0


class Fleet:
    """A context manager: inside it all processes run; outside, none is left, even if this process is killed.

    `run_dir` gets a log, a port file and the sockets of each process. Every method raises FleetError.
    """

    def __init__(self, spec: FleetSpec, run_dir: Path | str) -> None:
        self.spec = spec
        self.run_dir = Path(run_dir)
        self._slabs = [slab_name(os.getpid(), secrets.token_hex(4)) for _ in spec.kvstores]
        self._processes: dict[str, ServiceProcess] = {}
        # Children die with the thread that started them (see shim.py): one thread starts all and lives until the stop.
        self._starter = ThreadPoolExecutor(1, "fleet-starter")
        self._supervisor: Supervisor | None = None
        # (name, role, node) of those that should run.
        self._workers: list[tuple[str, str, int]] = []
        # Workers ever started, by role: a name is not given twice.
        self._added = Counter(role for _, role, _ in spec.workers)

    @property
    def address(self) -> str:
        """host:port of the first router."""
        return self._get("router").address

    @property
    def addresses(self) -> list[str]:
        """Of all routers."""
        return [self.address_of(name) for name in self.spec.router_names]

    @property
    def kvstore_address(self) -> str:
        """Of the first node's kvstore."""
        return self.address_of(self.spec.kvstores[0])

    @property
    def names(self) -> list[str]:
        """Of all processes, in the order of their start."""
        return list(self._processes)

    def address_of(self, name: str) -> str:
        return self._get(name).address

    def process(self, name: str) -> int:
        """The process id of a service, e.g. "decode-0"."""
        return self._get(name).pid

    def alive(self, name: str) -> bool:
        return self._get(name).alive

    def start(self) -> Fleet:
        """Returns when every process listens; see `wait_ready`. When one fails, all are stopped."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            remove_stale_slabs()
            self._start_all()
        except BaseException:
            self.stop()
            raise
        if self.spec.supervise:
            self._supervisor = Supervisor(self._processes.values(), self._launch)
        return self

    def add_worker(self, role: str) -> str:
        """Start one more "prefill", "decode" or "mixed" worker; its name, once it listens (see `wait_ready`).

        Neither this nor `drain` is for a fleet that is supervised.
        """
        if self._supervisor is not None:
            raise FleetError("a supervised fleet keeps the workers that it started with")
        at = self._added[role]
        self._added[role] += 1
        name, node = f"{role}-{at}", at % self.spec.nodes
        self._add_worker(name, role, node)
        self._wait_listening([name], time.monotonic() + START_S)
        return name

    def drain(self, name: str) -> None:
        """SIGTERM: a worker takes no new work, ends what it has, and goes; see `wait_gone`."""
        if self._supervisor is not None:
            raise FleetError("a supervised fleet keeps the workers that it started with")
        self._get(name).signal(signal.SIGTERM)
        self._workers = [worker for worker in self._workers if worker[0] != name]

    def wait_gone(self, name: str, timeout_s: float) -> None:
        """Until the process has ended by itself."""
        process, deadline_s = self._get(name), time.monotonic() + timeout_s
        while process.alive:
            if time.monotonic() > deadline_s:
                raise FleetError(f"{name} has not ended after {timeout_s:g} s; {process.tail()}")
            time.sleep(0.02)
        del self._processes[name]

    def wait_ready(self, timeout_s: float = START_S) -> FleetView:
        """Until every router says that every worker is attached and ready (and is the process that runs now); the view
        of the last router.
        """
        views = [self._wait_ready(address, timeout_s) for address in self.addresses]
        return views[-1]

    def _wait_ready(self, address: str, timeout_s: float) -> FleetView:
        names = {name for name, _, _ in self._workers}
        deadline_s = time.monotonic() + timeout_s
        missing = names
        with Client(address) as client:
            while time.monotonic() < deadline_s:
                view = self._view(client)
                if view is not None:
                    ready = {w.worker_id for w in view.workers if w.ready and w.pid == self._pids().get(w.worker_id)}
                    missing = names - ready
                    if not missing:
                        return view
                time.sleep(0.05)
        tails = "\n".join(self._get(name).tail() for name in sorted(missing))
        raise FleetError(f"not ready after {timeout_s:g} s: {', '.join(sorted(missing))}; {tails}")

    def kill(self, name: str) -> None:
        """kill -9, and wait for the end."""
        process = self._get(name)
        process.signal(signal.SIGKILL)
        process.wait_ended(time.monotonic() + STOP_S)

    def stop_signal(self, name: str) -> None:
        """SIGSTOP: the process hangs until `cont`."""
        self._get(name).signal(signal.SIGSTOP)

    def cont(self, name: str) -> None:
        self._get(name).signal(signal.SIGCONT)

    def restart(self, name: str) -> None:
        """Stops the process if it runs, and starts it again on the same port; returns when it listens."""
        process = self._get(name)
        _end([process])
        self._launch(process)
        process.wait_listening(time.monotonic() + START_S)

    def stop(self) -> None:
        """SIGTERM in order (router, workers, kvstores), SIGKILL after a grace of 5 s each. May be called twice."""
        if self._supervisor is not None:
            self._supervisor.stop()
            self._supervisor = None
        stores = set(self.spec.kvstores)
        routers = set(self.spec.router_names)
        for group in (routers, self._processes.keys() - stores - routers, stores):
            _end([self._processes[name] for name in group if name in self._processes])
        self._starter.shutdown()
        remove_slabs(self._slabs)

    def __enter__(self) -> Fleet:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_all(self) -> None:
        deadline_s = time.monotonic() + START_S
        for node, name in enumerate(self.spec.kvstores):
            flags = self.spec.flags_of_kvstore(node, self._slabs[node], str(self.run_dir))
            self._add(name, "kvstore", "kvstore", flags, node)
        for at, name in enumerate(self.spec.router_names):
            port = 0 if at else self.spec.port
            self._add(name, "router", "router", self.spec.extra_flags("router", name), 0, port)
        self._wait_listening([*self.spec.kvstores, *self.spec.router_names], deadline_s)
        for name, role, node in self.spec.workers:
            self._add_worker(name, role, node)
        self._wait_listening([name for name, _, _ in self.spec.workers], deadline_s)

    def _add_worker(self, name: str, role: str, node: int) -> None:
        self._workers.append((name, role, node))
        store = self.address_of(self.spec.kvstores[node])
        flags = self.spec.flags_of_worker(name, role, store, self.addresses, str(self.run_dir))
        self._add(name, role, "prefill" if role == "prefill" else "decode", flags, node)

    def _add(self, name: str, role: str, service: str, flags: list[str], node: int, port: int = 0) -> None:
        env, place = self.spec.extra_env(role, name), self.spec.place(node)
        self._processes[name] = ServiceProcess(name, service, flags, env, self.run_dir, port, place)
        self._launch(self._processes[name])

    def _launch(self, process: ServiceProcess) -> None:
        self._starter.submit(process.start).result()

    def _wait_listening(self, names: Iterable[str], deadline_s: float) -> None:
        for name in names:
            self._get(name).wait_listening(deadline_s)

    def _view(self, client: Client) -> FleetView | None:
        """None while the router does not answer. Without a supervisor, a dead process ends the wait."""
        if self._supervisor is None:
            for name in [*self.spec.kvstores, *self.spec.router_names, *(name for name, _, _ in self._workers)]:
                self._get(name).check()
        try:
            return client.fleet()
        except HeadwayClientError:
            return None

    def _pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    def _get(self, name: str) -> ServiceProcess:
        try:
            return self._processes[name]
        except KeyError:
            known = ", ".join(self._processes) or "none yet"
            raise FleetError(f"no process {name}; there are: {known}") from None


def _end(processes: list[ServiceProcess]) -> None:
    """SIGCONT, because a stopped process would never see the SIGTERM."""
    actions: list[Callable[[ServiceProcess], None]] = [
        lambda process: process.signal(signal.SIGCONT),
        lambda process: process.signal(signal.SIGTERM),
    ]
    deadline_s = time.monotonic() + STOP_S
    for action in actions:
        for process in processes:
            action(process)
    for process in processes:
        process.wait_ended(deadline_s)
