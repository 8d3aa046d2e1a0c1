"""Settings of the kvstore."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from headway.runtime.config import ConfigError, option
from headway.slab.device import CPU, KINDS, valid_name
from headway.slab.host import PAGE


@dataclass(frozen=True)
class KvStoreConfig:
    """The kvstore of Headway: owns a node's KV memory, its leases and its prefix cache."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(50052, "port to listen on; 0 lets the kernel choose")
    port_file: str = option("", "file that gets the port once the kvstore listens")
    node_id: str = option("node-0", "name of this node, unique in the fleet")
    device: str = option("cpu", f"where the slab lies: {KINDS}")
    slab_bytes: int = option(1 << 30, "bytes of KV memory")
    slab_name: str = option("headway", "name of the segment under /dev/shm, unique on this host")
    run_dir: str = option("/tmp", "folder for the unix socket that hands out the slab's descriptor")
    handoff_hold_s: float = option(10.0, "how long a lease waits for its decode worker after prefill")
    worker_silence_s: float = option(3.0, "after how long without a sign of life a worker's leases are suspended")
    planes: tuple[str, ...] = option(("socket", "grpc"), "how bytes may move between nodes: socket, grpc, nixl, peer")
    transfer_host: str = option("127.0.0.1", "address that other nodes' kvstores connect to for bytes")
    transfer_port: int = option(0, "port for that; 0 lets the kernel choose")
    transfer_connections: int = option(0, "data connections to each other node; 0: one for two cores, 2 to 4")
    transfer_timeout_s: float = option(5.0, "after how long without bytes a data connection is given up")
    checksum: str = option("sampled", "which transfers are checked for flipped bits", choices=("off", "sampled", "all"))
    host_bytes: int = option(0, "bytes of host memory that keep what a slab on a device evicts; 0: none")
    disk_dir: str = option("", "folder for the file of the disk tier, which keeps what the slab evicts; empty: none")
    disk_bytes: int = option(0, "bytes that this file may take")
    remote_url: str = option("", "Valkey or Redis server that keeps evicted blocks for all nodes; empty: none")
    log_level: str = option("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))

    @property
    def disk_file(self) -> Path:
        """Of the disk tier."""
        return Path(self.disk_dir) / f"headway-{self.node_id}.blocks"

    @property
    def connections(self) -> int:
        """To each other node: threads that copy, which more than half the cores would only make wait for each other.

        Never one alone: it is slow for the first 10 to 20 ms after a pause, perhaps as both its ends wake on one core.
        """
        return self.transfer_connections or max(2, min(4, (os.cpu_count() or 1) // 2))

    def __post_init__(self) -> None:
        if self.slab_bytes < PAGE:
            raise ConfigError(f"setting slab_bytes is {self.slab_bytes}; it must be at least {PAGE}")
        if not valid_name(self.device):
            raise ConfigError(f"setting device is {self.device}; it must be {KINDS}")
        if self.device == CPU and self.host_bytes:
            raise ConfigError("setting host_bytes is for slabs on a device; make slab_bytes larger instead")
        if self.host_bytes < 0:
            raise ConfigError(f"setting host_bytes is {self.host_bytes}; it must be at least 0")
        if self.device == CPU and "peer" in self.planes:
            raise ConfigError("setting planes names peer, which is for slabs on devices of one host; leave it out here")
        unknown = set(self.planes) - {"socket", "grpc", "nixl", "peer"}
        if unknown or not self.planes:
            named = ", ".join(self.planes)
            raise ConfigError(f"setting planes is {named}; it may name socket, grpc, nixl and peer, at least one")
        if self.transfer_connections < 0:
            raise ConfigError(f"setting transfer_connections is {self.transfer_connections}; it must be at least 0")
        if not 0 < self.transfer_timeout_s < math.inf:
            raise ConfigError(f"setting transfer_timeout_s is {self.transfer_timeout_s}; it must be above 0")
        if self.disk_dir and self.disk_bytes < PAGE:
            message = f"setting disk_bytes is {self.disk_bytes}; say how many bytes the file in disk_dir may take"
            raise ConfigError(message)
        if not 0 < self.handoff_hold_s < math.inf:
            raise ConfigError(f"setting handoff_hold_s is {self.handoff_hold_s}; it must be above 0")
