"""What a local fleet consists of, and the flags of each of its services."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headway.fleet.process import LOOPBACK, Place

MODEL_SLAB_BYTES = 1 << 30
SIM_SLAB_BYTES = 64 << 20


@dataclass(frozen=True)
class FleetSpec:
    """Numbers of workers, and what they serve. Names are router (router-1, …), kvstore (kvstore-1, … on further nodes),
    prefill-0, decode-0, mixed-0, and so on.

    Workers are dealt to the nodes in turn; each node has one kvstore. `port` is the first router's, 0 lets the kernel
    choose. `slab_bytes` is per kvstore (None: 1 GiB, or 64 MiB for simulated engines), `threads` per worker (None: of
    those that decode an even share of the cores; prefill workers use all that are left). `worker_flags` go to every
    worker; `flags` and `env` add to those of a role ("kvstore", "router", "prefill", "decode", "mixed") or of one
    process ("decode-1"). `supervise` restarts what dies, on its old port.

    `places` are those of the nodes (none: all on loopback); the routers run at the first.

    Raises ValueError.
    """

    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    model: str = "smollm2"
    engine: str = "auto"
    slab_bytes: int | None = None
    threads: int | None = None
    port: int = 0
    nodes: int = 1
    routers: int = 1
    worker_flags: Sequence[str] = ()
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    supervise: bool = False
    places: Sequence[Place] = ()

    def __post_init__(self) -> None:
        if self.places and len(self.places) != self.nodes:
            raise ValueError(f"{len(self.places)} places were given for {self.nodes} nodes")
        if min(self.prefill, self.decode, self.mixed) < 0 or self.nodes < 1 or self.routers < 1:
            raise ValueError("a fleet cannot have a negative number of workers, nor less than one node or router")
        if not self.mixed and not (self.prefill and self.decode):
            raise ValueError("a fleet needs a mixed worker, or at least one prefill and one decode worker")

    @property
    def workers(self) -> list[tuple[str, str, int]]:
        """(name, role, node) of each worker."""
        counts = {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}
        return [(f"{role}-{at}", role, at % self.nodes) for role, count in counts.items() for at in range(count)]

    @property
    def router_names(self) -> list[str]:
        return ["router", *(f"router-{at}" for at in range(1, self.routers))]

    @property
    def kvstores(self) -> list[str]:
        return ["kvstore", *(f"kvstore-{node}" for node in range(1, self.nodes))]

    def place(self, node: int) -> Place:
        return self.places[node] if self.places else LOOPBACK

    def flags_of_kvstore(self, node: int, slab_name: str, run_dir: str) -> list[str]:
        default = SIM_SLAB_BYTES if self.engine == "sim" else MODEL_SLAB_BYTES
        slab_bytes = default if self.slab_bytes is None else self.slab_bytes
        flags = ["--node-id", f"node-{node}", "--slab-bytes", str(slab_bytes), "--slab-name", slab_name]
        flags += ["--transfer-host", self.place(node).host]
        return [*flags, "--run-dir", run_dir, *self.extra_flags("kvstore", self.kvstores[node])]

    def flags_of_worker(self, name: str, role: str, kvstore: str, routers: Sequence[str], run_dir: str) -> list[str]:
        """`kvstore` and `routers` are addresses."""
        flags = ["--worker-id", name, "--kvstore", kvstore, "--routers", ",".join(routers), "--model", self.model]
        threads = self.threads or (0 if role == "prefill" else max(1, (os.cpu_count() or 1) // len(self.workers)))
        flags += ["--engine", self.engine, "--threads", str(threads)]
        flags += ["--timing-file", f"{run_dir}/{name}.timing.json"]
        if role != "prefill":
            flags += ["--role", role]
        return [*flags, *self.worker_flags, *self.extra_flags(role, name)]

    def extra_flags(self, role: str, name: str) -> list[str]:
        return [flag for key in dict.fromkeys([role, name]) for flag in self.flags.get(key, ())]

    def extra_env(self, role: str, name: str) -> dict[str, str]:
        return {**self.env.get(role, {}), **self.env.get(name, {})}
