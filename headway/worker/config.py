"""Settings that prefill and decode workers share."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass

from headway.core.order import Order, Rule
from headway.core.step import StepLimits
from headway.runtime.config import ConfigError, option
from headway.slab.device import KINDS, valid_name

ORDERS = tuple(rule.value for rule in Rule)
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("float", "bfloat16", "int8", "int4")
# Seconds of a forward of prompts, for whose end shorter ones need not, or have to, wait.
LAYERED_CHUNK_S, WHOLE_CHUNK_S = 0.5, 0.15


@dataclass(frozen=True)
class WorkerConfig:
    """One worker process. Times are in seconds, sizes in tokens unless named otherwise."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(0, "port to listen on; 0 lets the kernel choose")
    port_file: str = option("", "file that gets the port once the worker listens")
    worker_id: str = option("", "unique name of this worker; empty: made from host name and process id")
    kvstore: str = option("127.0.0.1:50052", "host:port of this node's kvstore")
    routers: tuple[str, ...] = option(("127.0.0.1:50051",), "host:port of every router, separated by commas")
    model: str = option("smollm2", "name of an added model, or a folder in Hugging Face format")
    engine: str = option("auto", "auto: transformers; sim: simulated engine", choices=("auto", "sim"))
    device: str = option("cpu", f"where the model computes and the node's slab lies: {KINDS}")
    dtype: str = option("auto", "of the model; auto: float32 on a CPU, bfloat16 on a GPU", choices=DTYPES)
    weights: str = option("float", "float: as dtype says; else how linear layers are kept, on a CPU", choices=WEIGHTS)
    kv_dtype: str = option("auto", "of K and V in the slab; auto: as dtype says", choices=(*DTYPES, "int8"))
    threads: int = option(0, "compute threads, at most; 0: all cores, half of them for a decode worker")
    keep_cores: int = option(
        -1,
        "cores of its own while it has sequences; 0: it yields; -1: prefill yields, others keep their threads",
    )
    copy_bytes: int = option(
        0, "that K and V of sequences that decode may take beside the slab; 0: as much as the slab"
    )
    speculate: str = option(
        "off",
        "auto: tokens that an answer will probably repeat are computed ahead where that is measured to pay; "
        "always: wherever something is predicted; off: never",
        choices=("auto", "always", "off"),
    )
    max_batch: int = option(64, "sequences in one forward; more than that take turns")
    chunk_tokens: int = option(8192, "prompt tokens in one forward, at most")
    chunk_s: float = option(
        0.0,
        "seconds that a forward of prompts may take; 0: 0.5 where shorter prompts go between its layers "
        "(prefill on a CPU), else 0.15, because they wait for it",
    )
    shared_chunk_s: float = option(0.1, "seconds that prompts may add to a forward in which other sequences decode")
    itl_objective_s: float = option(
        0.1, "seconds between tokens, which prompts beside them leave room for; 0: no limit"
    )
    order: str = option(
        "shortest", "in which order prompts are computed: shortest first, by arrival, or wspt", choices=ORDERS
    )
    ageing: float = option(0.1, "of the order shortest: what a second of waiting counts for against one of computing")
    timing_file: str = option("", "keeps over restarts how fast this worker was; empty: measure at each start")
    measure_s: float = option(1.0, "how long a worker without a timing file's figures may measure itself at its start")
    growth_tokens: int = option(128, "tokens of slots reserved for the answer before its first token")
    acquire_timeout_s: float = option(30.0, "how long a request may wait for slots")
    drain_s: float = option(30.0, "how long running sequences may go on after SIGTERM")
    log_level: str = option("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))
    sim_prefill: tuple[float, ...] = option(
        (0.0, 0.0, 0.0), "simulated prefill seconds: a,b,c of a + b·new + c·new·context"
    )
    sim_step: tuple[float, ...] = option((0.0, 0.0, 0.0), "simulated step seconds: a,b,c of a + b·batch + c·kv")
    sim_context: int = option(131072, "context of the simulated model")
    sim_poison_token: int = option(-1, "token id that kills a simulated engine's process; -1: none")

    def __post_init__(self) -> None:
        if not valid_name(self.device):
            raise ConfigError(f"setting device is {self.device}; it must be {KINDS}")
        if self.engine == "sim" and self.on_gpu:
            raise ConfigError(f"setting device is {self.device}; the simulated engine computes on the CPU")
        for name in ("sim_prefill", "sim_step"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < 0:
                raise ConfigError(f"setting {name} is {getattr(self, name)}; it must be three numbers of at least 0")
        if not self.shared_chunk_s > 0:
            raise ConfigError(f"setting shared_chunk_s is {self.shared_chunk_s}; it must be above 0")
        for name in ("chunk_s", "ageing", "measure_s", "itl_objective_s", "copy_bytes"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"setting {name} is {getattr(self, name)}; it must be at least 0")
        for name in ("max_batch", "chunk_tokens", "growth_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"setting {name} is {getattr(self, name)}; it must be at least 1")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def model_dtype(self) -> str:
        """`dtype` with its default filled in."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.on_gpu else "float32"

    @property
    def kv_format_dtype(self) -> str:
        """`kv_dtype` with its default filled in."""
        return self.model_dtype if self.kv_dtype == "auto" else self.kv_dtype

    def limits(self, layers: int) -> StepLimits:
        """layers: of its forwards of prompts, between which shorter ones go; 1: they do not."""
        chunk_s = self.chunk_s or (LAYERED_CHUNK_S if layers > 1 else WHOLE_CHUNK_S)
        itl_s = self.itl_objective_s or math.inf
        return StepLimits(self.max_batch, self.chunk_tokens, chunk_s, self.shared_chunk_s, itl_s, layers)

    @property
    def prompt_order(self) -> Order:
        return Order(Rule(self.order), self.ageing)

    @property
    def name(self) -> str:
        return self.worker_id or f"{socket.gethostname()}-{os.getpid()}"
