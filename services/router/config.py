"""Settings of the router."""

from __future__ import annotations

from dataclasses import dataclass

from headway.core.baselines import BASELINES
from headway.runtime.config import ConfigError, option

OURS = "headway"
POLICIES = (OURS, *BASELINES)


@dataclass(frozen=True)
class RouterConfig:
    """Router of Headway: what clients call, and where workers announce themselves."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(50051, "port to listen on; 0 lets the kernel choose")
    port_file: str = option("", "file that gets the port once the router listens")
    model_name: str = option("", "accept only workers of this model; empty: of whichever announces first")
    max_in_flight: int = option(1024, "requests in flight; more are refused")
    max_queued: int = option(512, "prompts waiting at one worker; a worker with more gets none")
    max_wait_s: float = option(300.0, "predicted seconds of prompts at a worker; with more it gets none; 0: no limit")
    policy: str = option(OURS, "how prompts are placed: headway's way, or another's to compare with", choices=POLICIES)
    max_buffered: int = option(4096, "messages kept for a client that does not read; more end its request")
    max_request_s: float = option(600.0, "seconds that a request may take, whatever deadline it asks for")
    status_timeout_s: float = option(2.0, "seconds without a status after which a worker counts as gone")
    no_worker_timeout_s: float = option(1.5, "seconds that a request waits for a worker that can serve it")
    store_linger_s: float = option(60.0, "seconds for which a node without workers is remembered")
    local_prefill_tokens: int = option(2048, "tokens of a prompt that a decode worker may compute by itself")
    itl_objective_s: float = option(0.1, "seconds between tokens, above which no prompt joins a batch; 0: no limit")
    pull_latency_s: float = option(0.005, "reckoned for fetching a prefix from another node, before its bytes")
    link_bytes_per_s: float = option(1e9, "reckoned between nodes at first; 0: nothing is pulled")
    max_index_blocks: int = option(4_000_000, "blocks remembered of all nodes (about 100 bytes each)")
    metrics_port: int = option(0, "port of the metrics for Prometheus (HTTP, /metrics); 0: none")
    drain_s: float = option(30.0, "how long running requests may go on after SIGTERM")
    log_level: str = option("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "max_queued", "max_buffered", "max_index_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"setting {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_request_s", "status_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"setting {name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "no_worker_timeout_s", "store_linger_s", "local_prefill_tokens", "drain_s", "pull_latency_s", "max_wait_s",
            "itl_objective_s", "link_bytes_per_s",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ConfigError(f"setting {name} is {getattr(self, name)}; it must be at least 0")
